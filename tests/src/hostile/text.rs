//! Texts: JSON and TOML with values that nobody expects.

use super::{Dice, Sample, sample};

const TOML: &str = r#"predicts = "v_prediction"
label_dropout = 0.2

[process]
steps = 50
betas = { kind = "linear", start = 0.0001, end = 0.02 }

[network]
block_out_channels = [8, 16]
down_block_types = ["DownBlock2D", "AttnDownBlock2D"]
up_block_types = ["AttnUpBlock2D", "UpBlock2D"]
layers_per_block = 1
norm_num_groups = 4

[train]
steps = 100
batch_size = 4
lr = 0.001
clip_norm = 1.0

[train.adamw]
beta1 = 0.9
weight_decay = 0.0

[train.guard.policy]
kind = "skip"
max_in_row = 3
"#;

/// A valid training configuration.
pub fn toml_seeds() -> Vec<Sample> {
    vec![sample("config.toml", "valid", TOML.into())]
}

/// What may stand where a value is expected.
const VALUES: [&str; 36] = [
    "null",
    "true",
    "0",
    "-1",
    "1",
    "2",
    "3",
    "0.5",
    "-0.0",
    "1e999",
    "-1e999",
    "1e308",
    "1e-320",
    "nan",
    "NaN",
    "inf",
    "Infinity",
    "-Infinity",
    "255",
    "65536",
    "1000000",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "18446744073709551616",
    "99999999999999999999999999999999999999",
    "\"\"",
    "\"x\"",
    "\"\\u0000\"",
    "\"\\ud800\"",
    "[]",
    "[0]",
    "[[[[]]]]",
    "{}",
    "{\"a\":1}",
];

/// Puts another value in the place of one, or damages a line.
pub(super) fn mutate(origin: &[u8], dice: &mut Dice) -> (String, Vec<u8>) {
    let text = String::from_utf8_lossy(origin);
    let mut lines: Vec<String> = text.lines().map(str::to_string).collect();
    let at = dice.below(lines.len());
    let line = lines[at].clone();
    let what = match (line.split_once([':', '=']), dice.below(10)) {
        (_, 0) => {
            lines.remove(at);
            format!("line {at} left out")
        }
        (_, 1) => {
            lines.insert(at, line.clone());
            format!("line {at} twice")
        }
        (_, 2) => {
            let other = dice.below(lines.len());
            lines.swap(at, other);
            format!("lines {at} and {other} exchanged")
        }
        (Some((name, value)), _) => {
            let new = VALUES[dice.below(VALUES.len())];
            let comma = if value.trim_end().ends_with(',') {
                ","
            } else {
                ""
            };
            let sign = &line[name.len()..=name.len()];
            lines[at] = format!("{name}{sign} {new}{comma}");
            format!("{} = {new}", name.trim())
        }
        (None, _) => {
            let new = VALUES[dice.below(VALUES.len())];
            lines[at] = new.to_string();
            format!("line {at} = {new}")
        }
    };
    (what, lines.join("\n").into_bytes())
}

/// Texts that somebody thought of.
pub fn specials(seeds: &[Sample]) -> Vec<Sample> {
    let mut out = Vec::new();
    for seed in seeds {
        let toml = seed.name.ends_with(".toml");
        let mut add = |what: String, bytes: Vec<u8>| {
            out.push(sample(&seed.name, format!("{}: {what}", seed.name), bytes));
        };
        for (what, bytes) in [
            ("nothing", &b""[..]),
            ("blanks", b" \n\t\r\n"),
            ("a list", b"[]"),
            ("a number", b"7"),
            ("null", b"null"),
            ("an empty object", b"{}"),
            ("two objects", b"{}{}"),
            ("a byte order mark", b"\xef\xbb\xbf{}"),
            ("UTF-16", b"\xff\xfe{\0}\0"),
            ("a zero", b"\0"),
            ("a picture", b"\x89PNG\r\n\x1a\n"),
        ] {
            add(what.into(), bytes.to_vec());
        }
        for n in [50, 200, 5000, 100_000, 1_000_000] {
            for (open, close) in [("[", "]"), ("{\"a\":", "}"), ("{a=", "}")] {
                let nested = format!("{}1{}", open.repeat(n), close.repeat(n));
                let text = if toml {
                    format!("a = {nested}")
                } else {
                    format!("{{\"a\":{nested}}}")
                };
                add(format!("{n} times {open}"), text.into_bytes());
            }
            if toml {
                add(
                    format!("a key of {n} parts"),
                    format!("{}b = 1", "a.".repeat(n)).into_bytes(),
                );
                add(
                    format!("a table of {n} parts"),
                    format!("[{}b]", "a.".repeat(n)).into_bytes(),
                );
            }
        }
        let body = String::from_utf8_lossy(&seed.bytes).into_owned();
        let inside = |more: &str| match toml {
            true => format!("{more}\n{body}"),
            false => body.replacen('{', &format!("{{{more},"), 1),
        };
        let (name, sign) = if toml { ("z", "=") } else { ("\"z\"", ":") };
        for n in [50_000, 240_000, 1 << 20, 6 << 20] {
            let zeros = format!("{name}{sign}[{}0]", "0,".repeat(n / 2));
            add(format!("a list of {n} bytes"), inside(&zeros).into_bytes());
            let text = format!("{name}{sign}\"{}\"", "x".repeat(n));
            add(format!("a text of {n} bytes"), inside(&text).into_bytes());
            let empty = if toml { "{a=1}," } else { "{\"\":0}," };
            let objects = format!("{name}{sign}[{}0]", empty.repeat(n / empty.len()));
            add(
                format!("objects of {n} bytes"),
                inside(&objects).into_bytes(),
            );
        }
        for at in (0..seed.bytes.len()).step_by(seed.bytes.len() / 16 + 1) {
            add(format!("cut after {at} bytes"), seed.bytes[..at].to_vec());
        }
    }
    out
}
