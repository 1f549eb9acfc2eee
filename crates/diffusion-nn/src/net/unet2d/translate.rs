//! Names of earlier versions.

use candle_core::Tensor;
use std::collections::BTreeMap;

/// Gives attention weights that carry the names of early versions (`query`, `key`, `value`,
/// `proj_attn`) their present ones (`to_q`, `to_k`, `to_v`, `to_out.0`). Other names stay, and
/// 1×1 convolutions become the linear maps that they are.
///
/// # Errors
/// If a weight of an attention layer cannot be reshaped.
pub fn translate_deprecated(
    weights: &BTreeMap<String, Tensor>,
) -> candle_core::Result<BTreeMap<String, Tensor>> {
    weights
        .iter()
        .map(|(name, value)| {
            let Some(renamed) = renamed(name) else {
                return Ok((name.clone(), value.clone()));
            };
            let value = match value.dims() {
                [o, i, 1, 1] => value.reshape((*o, *i))?,
                [o, i, 1] => value.reshape((*o, *i))?,
                _ => value.clone(),
            };
            Ok((renamed, value))
        })
        .collect()
}

fn renamed(name: &str) -> Option<String> {
    let mut parts: Vec<&str> = name.split('.').collect();
    let layer = parts.len().checked_sub(2)?;
    if !parts.contains(&"attentions") {
        return None;
    }
    parts[layer] = match parts[layer] {
        "query" => "to_q",
        "key" => "to_k",
        "value" => "to_v",
        "proj_attn" => "to_out.0",
        _ => return None,
    };
    Some(parts.join("."))
}
