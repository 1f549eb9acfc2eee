//! What every network checks about its inputs.

use crate::error::{Error, Result};
use candle_core::Tensor;

/// The size of the batch of maps `x [B, channels, H, W]`, and their height and width.
pub(crate) fn maps(
    name: &'static str,
    x: &Tensor,
    channels: usize,
) -> Result<(usize, usize, usize)> {
    match x.dims() {
        [b, c, h, w] if *c == channels => Ok((*b, *h, *w)),
        found => Err(Error::Input {
            name,
            found: format!("of shape {found:?}"),
            expected: format!("[B, {channels}, H, W]"),
        }),
    }
}

/// Height and width that halve evenly this many times.
pub(crate) fn halving(
    name: &'static str,
    (height, width): (usize, usize),
    times: usize,
) -> Result<()> {
    let unit = 1usize.checked_shl(times as u32).unwrap_or(0).max(1);
    if height.is_multiple_of(unit) && width.is_multiple_of(unit) {
        return Ok(());
    }
    Err(Error::Input {
        name,
        found: format!("{height}x{width} pixels"),
        expected: format!("height and width that are multiples of {unit}"),
    })
}

/// Times `[B]` from a scalar, `[1]` or `[B]`.
pub(crate) fn times(name: &'static str, t: &Tensor, batch: usize) -> Result<Tensor> {
    match t.dims() {
        [] | [1] => Ok(t.flatten_all()?.broadcast_as(batch)?.contiguous()?),
        [n] if *n == batch => Ok(t.clone()),
        found => Err(Error::Input {
            name,
            found: format!("of shape {found:?}"),
            expected: format!("a scalar or [{batch}]"),
        }),
    }
}

/// The argument, given exactly where the network has a use for it.
pub(crate) fn exactly<'a>(
    name: &'static str,
    wanted: bool,
    given: Option<&'a Tensor>,
) -> Result<Option<&'a Tensor>> {
    if wanted == given.is_some() {
        return Ok(given);
    }
    let say = |there: bool| if there { "given" } else { "absent" };
    Err(Error::Input {
        name,
        found: say(!wanted).into(),
        expected: say(wanted).into(),
    })
}
