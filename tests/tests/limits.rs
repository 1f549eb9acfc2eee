//! Every limit of a reader has a file just below it that is read, and one just above that is not.
//!
//! Limits of single functions are tried where the functions are: sides and bytes of decoded images in
//! `data/container.rs`, ratios in `data/npz/tests.rs` and `data/cifar/tests.rs`, the smaller settings
//! of [`Limits`](diffusion_core::limits::Limits) in `limits.rs` and `checkpoint_tensors.rs`.

// Helpers of tests may stop a test as its body may.
#![allow(clippy::unwrap_used, clippy::panic)]

use diffusion_tests::hostile::build::{
    Member, adler32, chunk, crc32, gzip, npy, png, png_header, stored, zeros, zeros_len, zip, zlib,
};
use diffusion_tests::hostile::weights::{archive, dict, entry, file, object, view};
use diffusion_tests::targets::{Bench, Format, Verdict};

/// Feeds both files and looks for a word in the message about the second.
fn edge(bench: &Bench, format: Format, name: &str, below: &[u8], above: &[u8], word: &str) {
    let below = bench.feed(format, name, below).unwrap();
    assert_eq!(below, Verdict::Accepted, "{format:?}, just below `{word}`");
    match bench.feed(format, name, above).unwrap() {
        Verdict::Refused(text) => assert!(text.contains(word), "no `{word}` in: {text}"),
        other => panic!("{format:?}, just above `{word}`: {other:?}"),
    }
}

fn line(width: u32) -> Vec<u8> {
    let rows = vec![0; 1 + width as usize];
    let data = chunk(b"IDAT", &zlib(&stored(&rows), adler32(&rows)));
    png(&[png_header(width, 1, 8, 0, 0), data])
}

fn idx(sizes: [u32; 3], data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0, 8, 3];
    bytes.extend(sizes.iter().flat_map(|size| size.to_be_bytes()));
    bytes.extend(data);
    bytes
}

#[test]
fn sides_and_bytes_of_images() {
    let bench = Bench::new().unwrap();
    let (below, above) = (line(16_384), line(16_385));
    edge(&bench, Format::Png, "a.png", &below, &above, "16384x16384");
    let wide = |side: u32| idx([1, 1, side], &vec![7; side as usize]);
    let (below, above) = (wide(16_384), wide(16_385));
    edge(&bench, Format::Idx, "a", &below, &above, "16384x16384");
    let tall = |rows: u32| idx([1, rows, 8192], &vec![7; 8192 * rows as usize]);
    let (below, above) = (tall(8192), tall(8193));
    edge(&bench, Format::Idx, "a", &below, &above, "67108864 bytes");
    let array = |side: usize| {
        let data = vec![7; side];
        let array = npy("|u1", &format!("(1, 1, {side})"), &data);
        zip(&[Member::stored("images.npy", &array)])
    };
    let (below, above) = (array(16_384), array(16_385));
    edge(&bench, Format::Npz, "a.npz", &below, &above, "16384x16384");
}

#[test]
fn what_a_gzip_file_may_claim() {
    let bench = Bench::new().unwrap();
    // Black pixels behind a header, at the ratio of fixed Huffman codes, 159 to 1.
    let n = 260_200;
    let packed = |count: u64, deflate: &[u8], crc: u32| {
        let header = idx([count as u32, 1, 1], &[]);
        let length = header.len() as u16;
        let block = [
            &[0][..],
            &length.to_le_bytes(),
            &(!length).to_le_bytes(),
            &header,
        ]
        .concat();
        gzip(&[&block, deflate].concat(), crc, 16 + zeros_len(n) as u32)
    };
    let (data, count) = (zeros(n), zeros_len(n));
    assert!(count > 64 << 20);
    let all = [idx([count as u32, 1, 1], &[]), vec![0; count as usize]].concat();
    let below = packed(count, &data, crc32(&all));
    let most = 200 * below.len() as u64;
    let above = packed(most + 1, &data, crc32(&all));
    assert_eq!(below.len(), above.len());
    let word = "at most 200 bytes for each";
    edge(&bench, Format::Idx, "a.gz", &below, &above, word);
}

#[test]
fn headers_and_counts_of_safetensors() {
    let bench = Bench::new().unwrap();
    let edge = |below: &[u8], above: &[u8], word: &str| {
        edge(
            &bench,
            Format::Safetensors,
            "a.safetensors",
            below,
            above,
            word,
        );
    };
    let of_length = |length: usize| {
        let empty = r#"{"__metadata__":{"a":""}}"#.len();
        let text = "x".repeat(length - empty);
        file(&format!(r#"{{"__metadata__":{{"a":"{text}"}}}}"#), &[])
    };
    edge(
        &of_length(16 << 20),
        &of_length((16 << 20) + 1),
        "safetensors_header",
    );
    let many = |n: usize| {
        let entries: Vec<String> = (0..n)
            .map(|i| entry(&i.to_string(), "U8", "[0]", 0, 0))
            .collect();
        file(&object(&entries), &[])
    };
    edge(
        &many(100_000),
        &many(100_001),
        "100001; expected at most 100000",
    );
    let deep = |n: usize| {
        let shape = format!("[{}1]", "1,".repeat(n - 1));
        file(&object(&[entry("a", "U8", &shape, 0, 1)]), &[1])
    };
    edge(&deep(32), &deep(33), "at most 32 sizes");
    let one = || object(&[entry("a", "U8", "[1]", 0, 1)]);
    edge(
        &file(&one(), &[1]),
        &file(&one(), &[1, 1]),
        "the end of the last tensor",
    );
}

#[test]
fn instructions_and_names_of_pickles() {
    let bench = Bench::new().unwrap();
    let edge = |below: &[u8], above: &[u8], word: &str| {
        edge(&bench, Format::Pth, "a.pth", below, above, word);
    };
    // N and 0 push and pop; } and . make the result.
    let steps = |n: usize| archive(&[&b"N0".repeat(n / 2 - 1)[..], b"}."].concat(), &[0; 4]);
    edge(
        &steps(1_000_000),
        &steps(1_000_002),
        "more than 1000000 instructions",
    );
    let shape = |n: usize| {
        let sizes = vec![1; n];
        archive(
            &dict(&[("w", view("FloatStorage", "0", 0, &sizes, &sizes))]),
            &[0; 4],
        )
    };
    edge(&shape(16), &shape(17), "a tensor of 17 dimensions");
    let key = |n: usize| {
        let key = "k".repeat(n);
        let program = dict(&[("w", view("FloatStorage", &key, 0, &[1], &[1]))]);
        zip(&[
            Member::stored("a/data.pkl", &program),
            Member::stored(&format!("a/data/{key}"), &[0; 4]),
        ])
    };
    edge(&key(256), &key(257), "something else than a storage");
    let members = |n: usize| {
        let names = (0..n - 2).map(|i| format!("a/data/{i}"));
        let mut members: Vec<Member> = names.map(|name| Member::stored(&name, &[])).collect();
        members.push(Member::stored("a/data.pkl", b"}."));
        members.push(Member::stored("a/version", b"3"));
        zip(&members)
    };
    edge(&members(100_000), &members(100_001), "tensors");
    let long = |n: usize| {
        let text = n - 8;
        let program = [
            &b"X"[..],
            &(text as u32).to_le_bytes(),
            &vec![b'x'; text],
            b"0}.",
        ];
        archive(&program.concat(), &[0; 4])
    };
    edge(&long(16 << 20), &long((16 << 20) + 1), "json_bytes");
}

#[test]
fn lengths_of_texts() {
    let bench = Bench::new().unwrap();
    let padded = |text: &[u8], length: usize| {
        let mut bytes = text.to_vec();
        bytes.resize(length, b'\n');
        bytes
    };
    let half = 512 << 10;
    let (below, above) = (padded(b"", half), padded(b"", half + 1));
    edge(
        &bench,
        Format::Toml,
        "config.toml",
        &below,
        &above,
        "config_bytes",
    );
    for (name, bytes) in bench.valid(Format::Json).unwrap() {
        let (below, above) = (padded(&bytes, half), padded(&bytes, half + 1));
        edge(&bench, Format::Json, name, &below, &above, "config_bytes");
    }
    // A manifest vouches for its own bytes, so that none may follow it.
    for (name, bytes) in bench.valid(Format::Manifest).unwrap() {
        let (one, many) = (
            padded(&bytes, bytes.len() + 1),
            padded(&bytes, (16 << 20) + 1),
        );
        edge(&bench, Format::Manifest, name, &bytes, &one, "seal");
        edge(
            &bench,
            Format::Manifest,
            name,
            &bytes,
            &many,
            "16777217 bytes long",
        );
    }
}

#[test]
fn headers_and_dimensions_of_arrays() {
    let bench = Bench::new().unwrap();
    let header = |length: usize| {
        let text = "{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1, 2), }";
        let mut array = b"\x93NUMPY\x02\0".to_vec();
        array.extend((length as u32).to_le_bytes());
        array.extend(text.bytes());
        array.resize(12 + length, b' ');
        array.extend([1, 2]);
        zip(&[Member::stored("images.npy", &array)])
    };
    let (below, above) = (header(1 << 16), header((1 << 16) + 1));
    edge(
        &bench,
        Format::Npz,
        "a.npz",
        &below,
        &above,
        "at most 65536",
    );
    let labels = |largest: u32| {
        let images = npy("|u1", "(1, 1, 1)", &[7]);
        let labels = npy("<u4", "(1,)", &largest.to_le_bytes());
        zip(&[
            Member::stored("images.npy", &images),
            Member::stored("labels.npy", &labels),
        ])
    };
    let (below, above) = (labels(65_535), labels(65_536));
    edge(&bench, Format::Npz, "a.npz", &below, &above, "0 to 65535");
}
