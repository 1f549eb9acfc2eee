//! Tensors by name: safetensors and pickles.

use super::build::{Member, zip};
use super::{Sample, sample};

/// A safetensors file of a header and data.
pub fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    bytes.extend(data);
    bytes
}

/// The entry of a tensor in a safetensors header.
pub fn entry(name: &str, dtype: &str, shape: &str, begin: u64, end: u64) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
}

/// A JSON object of entries.
pub fn object(entries: &[String]) -> String {
    format!("{{{}}}", entries.join(","))
}

/// A small valid safetensors file.
pub fn safetensors_seeds() -> Vec<Sample> {
    let header = object(&[
        r#""__metadata__":{"format":"pt"}"#.into(),
        entry("a", "F32", "[2,3]", 0, 24),
        entry("b", "BF16", "[4]", 24, 32),
        entry("c", "BOOL", "[3]", 32, 35),
    ]);
    vec![sample("a.safetensors", "valid", file(&header, &[1; 35]))]
}

/// Safetensors files that somebody thought of.
pub fn safetensors_specials() -> Vec<Sample> {
    let mut out = Vec::new();
    let mut add = |what: &str, bytes: Vec<u8>| out.push(sample("a.safetensors", what, bytes));
    for claim in super::CLAIMS {
        let mut bytes = file("{}", &[]);
        bytes[..8].copy_from_slice(&claim.to_le_bytes());
        add(&format!("a header of {claim} bytes"), bytes);
    }
    let one =
        |dtype: &str, shape: &str, begin, end| object(&[entry("a", dtype, shape, begin, end)]);
    for shape in [
        "[]",
        "[0]",
        "[4]",
        "[2,3]",
        "[18446744073709551615]",
        "[4294967296,4294967296]",
        "[-1]",
        "[1.5]",
        "[\"4\"]",
        "null",
        "[0,18446744073709551615,18446744073709551615]",
        "[0,9223372036854775808,2]",
        "[9223372036854775808,9223372036854775808,0]",
        "[[4]]",
        "{}",
        "4",
    ] {
        for (begin, end) in [(0, 4), (0, 0), (4, 0), (0, u64::MAX), (u64::MAX, u64::MAX)] {
            add(
                &format!("shape {shape} in {begin}..{end}"),
                file(&one("U8", shape, begin, end), &[1; 4]),
            );
        }
    }
    for dtype in [
        "F64",
        "I16",
        "U64",
        "F8_E4M3",
        "C64",
        "f32",
        "",
        "BOOL",
        "I64\\u0000",
    ] {
        add(
            &format!("type {dtype}"),
            file(&one(dtype, "[4]", 0, 4), &[7; 4]),
        );
    }
    let a = || entry("a", "U8", "[4]", 0, 4);
    add("a name twice", file(&object(&[a(), a()]), &[1; 4]));
    add(
        "a name twice, escaped",
        file(
            &object(&[a(), a().replacen("\"a\"", "\"\\u0061\"", 1)]),
            &[1; 4],
        ),
    );
    add(
        "an overlap",
        file(&object(&[a(), entry("b", "U8", "[4]", 2, 6)]), &[1; 6]),
    );
    add(
        "a gap",
        file(&object(&[a(), entry("b", "U8", "[4]", 5, 9)]), &[1; 9]),
    );
    add("bytes behind the last", file(&object(&[a()]), &[1; 5]));
    add(
        "two metadata",
        file(
            &format!("{{{m},{m},{}}}", a(), m = r#""__metadata__":{}"#),
            &[1; 4],
        ),
    );
    add(
        "metadata of numbers",
        file(
            &format!("{{{},{}}}", r#""__metadata__":{"a":1}"#, a()),
            &[1; 4],
        ),
    );
    add(
        "an unknown field",
        file(
            &object(&[a().replace("\"shape\"", "\"x\":1,\"shape\"")]),
            &[1; 4],
        ),
    );
    add(
        "a field twice",
        file(
            &object(&[a().replace("\"shape\"", "\"dtype\":\"U8\",\"shape\"")]),
            &[1; 4],
        ),
    );
    for text in [
        "",
        "[]",
        "null",
        "{",
        "{}}",
        "{} {}",
        "\u{feff}{}",
        "{\"a\":null}",
        "{\"a\":{}}",
        "\u{0}",
    ] {
        add(&format!("the header {text:?}"), file(text, &[]));
    }
    add(
        "a header that is not UTF-8",
        [&2u64.to_le_bytes()[..], &[0xff, 0xfe]].concat(),
    );
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        for n in [100, 10_000, 1_000_000] {
            let nested = format!("{}1{}", open.repeat(n), close.repeat(n));
            add(&format!("{n} times {open}"), file(&nested, &[]));
            let inside = format!("{{\"a\":{{\"dtype\":\"U8\",\"shape\":{nested}}}}}");
            add(&format!("{n} times {open} as a shape"), file(&inside, &[]));
        }
    }
    let many = |n: usize, f: &dyn Fn(usize) -> String| object(&(0..n).map(f).collect::<Vec<_>>());
    let empty = |i: usize| entry(&format!("{i}"), "U8", "[0]", 0, 0);
    add("100 001 tensors", file(&many(100_001, &empty), &[]));
    add("250 000 tensors", file(&many(250_000, &empty), &[]));
    let texts = many(900_000, &|i| format!("\"{i}\":\"\""));
    add(
        "900 000 texts",
        file(&format!("{{\"__metadata__\":{texts}}}"), &[]),
    );
    let sizes = format!("[{}0]", "0,".repeat(4_000_000));
    add("4 000 000 sizes", file(&one("U8", &sizes, 0, 0), &[]));
    add(
        "33 sizes",
        file(&one("U8", &format!("[{}1]", "1,".repeat(32)), 0, 1), &[1]),
    );
    add(
        "a name of a megabyte",
        file(
            &object(&[entry(&"n".repeat(1 << 20), "X", "[1]", 0, 1)]),
            &[1],
        ),
    );
    out
}

/// `_rebuild_tensor_v2` of float storage `key`.
pub fn view(class: &str, key: &str, offset: u32, shape: &[u32], stride: &[u32]) -> Vec<u8> {
    let mut p = b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec();
    p.extend(text("storage"));
    p.extend(format!("ctorch\n{class}\n").bytes());
    p.extend(text(key));
    p.extend(text("cpu"));
    p.extend(b"K\x06tQ");
    p.extend(int(offset));
    for sizes in [shape, stride] {
        p.push(b'(');
        sizes.iter().for_each(|size| p.extend(int(*size)));
        p.push(b't');
    }
    p.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    p
}

fn int(value: u32) -> Vec<u8> {
    let mut p = vec![0x8a, 5];
    p.extend(u64::from(value).to_le_bytes().into_iter().take(5));
    p
}

fn text(value: &str) -> Vec<u8> {
    let mut p = vec![b'X'];
    p.extend((value.len() as u32).to_le_bytes());
    p.extend(value.bytes());
    p
}

/// A pickle of an ordered dictionary; each value is a piece of program.
pub fn dict(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut p = b"\x80\x02ccollections\nOrderedDict\n)Rq\0(".to_vec();
    for (name, value) in entries {
        p.extend(text(name));
        p.extend(value);
    }
    p.extend(b"u.");
    p
}

/// A file as PyTorch writes it: a pickle and one storage.
pub fn archive(program: &[u8], data: &[u8]) -> Vec<u8> {
    zip(&[
        Member::stored("a/data.pkl", program),
        Member::stored("a/byteorder", b"little"),
        Member::stored("a/data/0", data),
        Member::stored("a/version", b"3\n"),
    ])
}

/// A small valid pickle.
pub fn pth_seeds() -> Vec<Sample> {
    let program = dict(&[
        ("whole", view("FloatStorage", "0", 0, &[2, 3], &[3, 1])),
        ("turned", view("FloatStorage", "0", 0, &[3, 2], &[1, 3])),
    ]);
    vec![sample("a.pth", "valid", archive(&program, &[1; 24]))]
}

/// Pickles that somebody thought of.
pub fn pth_specials() -> Vec<Sample> {
    let mut out = Vec::new();
    let data = [1u8; 24];
    let mut add = |what: &str, bytes: Vec<u8>| out.push(sample("a.pth", what, bytes));
    let mut run = |what: &str, program: &[u8]| add(what, archive(program, &data));
    for op in 0..=255u8 {
        // On an empty stack, and on one with something on it.
        run(&format!("the instruction {op:#04x}"), &[op, b'.']);
        run(
            &format!("the instruction {op:#04x} on a stack"),
            &[b'}', b'(', b'N', op, b'N', b'.'],
        );
    }
    for (module, name) in [
        ("os", "system"),
        ("builtins", "eval"),
        ("posix", "system"),
        ("torch", "load"),
        ("numpy", "load"),
    ] {
        let call = [
            format!("c{module}\n{name}\n(").as_bytes(),
            &text("true"),
            b"tR",
        ]
        .concat();
        run(
            &format!("a call of {module}.{name}"),
            &dict(&[("w", call.clone())]),
        );
        run(
            &format!("a call of {module}.{name} before"),
            &[&call[..], b"0", &dict(&[])].concat(),
        );
    }
    for (shape, stride, offset) in [
        (&[u32::MAX; 2][..], &[0; 2][..], 0),
        (&[u32::MAX; 4], &[0; 4], 0),
        (&[6], &[u32::MAX], 0),
        (&[6], &[1], u32::MAX),
        (&[0, u32::MAX, u32::MAX, u32::MAX], &[1; 4], 0),
        (&[7], &[0], 0),
        (&[2, 3], &[3], 0),
        (&[1; 17], &[1; 17], 0),
        (&[], &[], 0),
        (&[], &[], 9),
    ] {
        let view = view("FloatStorage", "0", offset, shape, stride);
        run(
            &format!("shape {shape:?}, stride {stride:?}, offset {offset}"),
            &dict(&[("w", view)]),
        );
    }
    for (class, key) in [
        ("FloatStorage", "1"),
        ("FloatStorage", "../0"),
        ("FloatStorage", ""),
        ("ComplexDoubleStorage", "0"),
        ("", "0"),
    ] {
        run(
            &format!("storage {class:?} {key:?}"),
            &dict(&[("w", view(class, key, 0, &[1], &[1]))]),
        );
    }
    let w = || view("FloatStorage", "0", 0, &[1], &[1]);
    run("a name twice", &dict(&[("w", w()), ("w", w())]));
    let deep: Vec<u8> = b"(".repeat(900_000);
    run("900 000 marks", &deep);
    run(
        "900 000 tuples",
        &[b"N".to_vec(), vec![0x85; 900_000], b".".to_vec()].concat(),
    );
    run("900 000 empty lists", &b"]".repeat(900_000));
    run(
        "900 000 memories",
        &[b"N".to_vec(), vec![0x94; 900_000]].concat(),
    );
    run("2 000 000 instructions", &b"N".repeat(2_000_000));
    let long = text(&"x".repeat(1 << 20));
    run(
        "a class by a long name again and again",
        &[&b"("[..], &long, b"q\0", &b"h\0h\0\x93".repeat(100_000)].concat(),
    );
    let shape = [&b"("[..], &b"K\0".repeat(1000), b"tq\x01"].concat();
    run(
        "a long shape again and again",
        &[&shape[..], &b"h\x01h\x01\x86".repeat(100_000)].concat(),
    );
    let function = b"ctorch._utils\n_rebuild_tensor_v2\nq\x01";
    let args = [
        &b"(("[..],
        &text("storage"),
        b"ctorch\nFloatStorage\n",
        &text("0"),
        b"tQK\0(K\x06t(K\x01ttq\x02",
    ]
    .concat();
    run(
        "300 000 tensors of one storage",
        &[&function[..], &args, &b"h\x01h\x02R".repeat(300_000)].concat(),
    );
    run("a dictionary within itself", b"}q\0h\0h\0s.");
    let state = text("state_dict");
    run(
        "a state_dict that is itself",
        &[&b"}q\0"[..], &state, b"h\0s."].concat(),
    );
    for (what, sizes) in [
        ("negative", [0xff; 8]),
        ("of 2^63", [0, 0, 0, 0, 0, 0, 0, 0x80]),
    ] {
        let mut program = dict(&[("w", w())]);
        if let Some(at) = program.windows(2).rposition(|w| w == [0x8a, 5]) {
            program.splice(at..at + 7, [&[0x8a, 8][..], &sizes].concat());
        }
        run(&format!("a stride {what}"), &program);
    }
    // Many views that are each worth the whole storage.
    let names: Vec<String> = (0..2000).map(|i| format!("w{i}")).collect();
    let views: Vec<(&str, Vec<u8>)> = names
        .iter()
        .enumerate()
        .map(|(i, name)| {
            (
                name.as_str(),
                view("FloatStorage", "0", i as u32, &[200_000], &[1]),
            )
        })
        .collect();
    add(
        "2000 overlapping views",
        archive(&dict(&views), &vec![0; 1 << 20]),
    );
    let apart: Vec<(&str, Vec<u8>)> = names
        .iter()
        .enumerate()
        .map(|(i, name)| {
            (
                name.as_str(),
                view("FloatStorage", ["0", "1"][i % 2], i as u32, &[1], &[1]),
            )
        })
        .collect();
    let big = vec![0; 8 << 20];
    let members = ["a/data/0", "a/data/1"].map(|name| Member::stored(name, &big));
    let program = Member::stored("a/data.pkl", &dict(&apart));
    add(
        "two storages in turn",
        zip(&[&[program.clone()][..], &members].concat()),
    );
    add("a member twice", zip(&[program.clone(), program.clone()]));
    add("no member", zip(&[]));
    add("no program", zip(&members));
    add("an empty program", archive(&[], &data));
    add(
        "big-endian",
        zip(&[program.clone(), Member::stored("a/byteorder", b"big")]),
    );
    add(
        "a long byte order",
        zip(&[program.clone(), Member::stored("a/byteorder", &[b'l'; 99])]),
    );
    for method in [8, 99] {
        add(
            &format!("method {method}"),
            zip(&[Member {
                method,
                ..program.clone()
            }]),
        );
    }
    add(
        "a size of 4 GiB",
        zip(&[Member {
            size: u32::MAX,
            ..program
        }]),
    );
    add(
        "a hundred thousand members",
        zip(&vec![Member::default(); 60_000]),
    );
    for (what, bytes) in [
        ("a web page", &b"<!doctype html>"[..]),
        ("an old pickle", b"\x80\x02\x8a\x0a"),
        ("nothing", b""),
        ("only the magic", b"PK\x03\x04"),
    ] {
        add(what, bytes.to_vec());
    }
    out
}
