//! Pictures: PNG and JPEG.

use super::build::{adler32, chunk, png, png_header, stored, zeros, zlib};
use super::{Sample, sample};

macro_rules! seed {
    ($name:literal) => {
        sample(
            $name,
            "valid",
            include_bytes!(concat!("../../bad/seeds/", $name)).to_vec(),
        )
    };
}

/// Small valid PNG files.
pub fn png_seeds() -> Vec<Sample> {
    let rows = [0u8, 10, 20, 30, 0, 40, 50, 60];
    let data = chunk(b"IDAT", &zlib(&stored(&rows), adler32(&rows)));
    vec![
        seed!("grey16.png"),
        seed!("one-bit.png"),
        seed!("alpha.png"),
        seed!("palette.png"),
        sample(
            "plain.png",
            "valid",
            png(&[png_header(3, 2, 8, 0, 0), data]),
        ),
    ]
}

/// PNG files that somebody thought of.
pub fn png_specials() -> Vec<Sample> {
    let rows = [0u8; 4];
    let idat = |raw: &[u8]| chunk(b"IDAT", &zlib(&stored(raw), adler32(raw)));
    let bomb = |n: usize| chunk(b"IDAT", &zlib(&zeros(n), 1));
    let mut out = Vec::new();
    let mut add = |what: &str, chunks: &[Vec<u8>]| out.push(sample("a.png", what, png(chunks)));
    for (width, height) in [
        (0, 1),
        (1, 0),
        (65_535, 65_535),
        (16_385, 1),
        (u32::MAX, 1),
        (1, u32::MAX),
    ] {
        for interlaced in [0, 1] {
            let header = png_header(width, height, 8, 6, interlaced);
            add(&format!("{width}x{height}"), &[header, idat(&rows)]);
        }
    }
    for depth in [0, 1, 2, 3, 4, 5, 8, 15, 16, 32, 255] {
        for color in [0, 1, 2, 3, 4, 5, 6, 7, 255] {
            let header = png_header(3, 1, depth, color, 0);
            add(
                &format!("{depth} bits of colour {color}"),
                &[header, idat(&[0; 25])],
            );
        }
    }
    add(
        "a bomb of 64 MiB behind 4x4",
        &[png_header(4, 4, 8, 0, 0), bomb(260_000)],
    );
    add(
        "a bomb of 250 MiB behind 16000x16000",
        &[png_header(16_000, 16_000, 8, 0, 0), bomb(1_000_000)],
    );
    add(
        "an interlace method of 7",
        &[png_header(3, 1, 8, 0, 7), idat(&rows)],
    );
    let header = || png_header(3, 1, 8, 0, 0);
    let text = |deflate: &[u8]| chunk(b"zTXt", &[b"key\0\0", &zlib(deflate, 1)[..]].concat());
    add(
        "a bomb in a text",
        &[header(), text(&zeros(200_000)), idat(&rows)],
    );
    let profile = |deflate: &[u8]| chunk(b"iCCP", &[b"key\0\0", &zlib(deflate, 1)[..]].concat());
    add(
        "a bomb in a profile",
        &[header(), profile(&zeros(200_000)), idat(&rows)],
    );
    add(
        "two palettes",
        &[
            png_header(3, 1, 8, 3, 0),
            chunk(b"PLTE", &[1; 6]),
            chunk(b"PLTE", &[2; 6]),
            idat(&rows),
        ],
    );
    add(
        "a palette of 257",
        &[
            png_header(3, 1, 8, 3, 0),
            chunk(b"PLTE", &[1; 771]),
            idat(&rows),
        ],
    );
    add(
        "an index beyond the palette",
        &[
            png_header(3, 1, 8, 3, 0),
            chunk(b"PLTE", &[1; 3]),
            idat(&[0, 9, 9, 9]),
        ],
    );
    add(
        "transparency of a wrong length",
        &[header(), chunk(b"tRNS", &[0; 9]), idat(&rows)],
    );
    add("a filter of 9", &[header(), idat(&[9, 1, 2, 3])]);
    add(
        "a thousand empty data chunks",
        &[
            header(),
            vec![chunk(b"IDAT", &[]); 1000].concat(),
            idat(&rows),
        ],
    );
    add(
        "a hundred thousand chunks",
        &[
            header(),
            vec![chunk(b"tEXt", b"a\0"); 100_000].concat(),
            idat(&rows),
        ],
    );
    add(
        "an animation",
        &[
            header(),
            chunk(b"acTL", &[0xff; 8]),
            chunk(b"fcTL", &[0xff; 26]),
            idat(&rows),
        ],
    );
    add(
        "an Exif of nothing",
        &[header(), chunk(b"eXIf", &[]), idat(&rows)],
    );
    add(
        "an Exif that points nowhere",
        &[
            header(),
            chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
            idat(&rows),
        ],
    );
    out
}

/// Small valid JPEG files.
pub fn jpeg_seeds() -> Vec<Sample> {
    vec![
        seed!("color.jpg"),
        seed!("grey.jpg"),
        seed!("progressive.jpg"),
    ]
}

/// JPEG files that somebody thought of.
pub fn jpeg_specials(seeds: &[Sample]) -> Vec<Sample> {
    let mut out = Vec::new();
    for seed in seeds {
        let Some(frame) = seed
            .bytes
            .windows(2)
            .position(|w| matches!(w, [0xff, 0xc0 | 0xc2]))
        else {
            continue;
        };
        let mut sized = |height: u16, width: u16, more: Vec<u8>| {
            let mut bytes = seed.bytes.clone();
            bytes[frame + 5..frame + 7].copy_from_slice(&height.to_be_bytes());
            bytes[frame + 7..frame + 9].copy_from_slice(&width.to_be_bytes());
            let end = bytes.len() - 2;
            let added = more.len();
            bytes.splice(end..end, more);
            let what = format!("{}: {width}x{height}, {added} bytes more", seed.name);
            out.push(sample("a.jpg", what, bytes));
        };
        for (height, width) in [
            (0, 9),
            (9, 0),
            (1, 65_535),
            (65_535, 65_535),
            (16_385, 2),
            (4000, 4000),
        ] {
            sized(height, width, Vec::new());
            sized(height, width, vec![0x55; 70_000]);
        }
        // The last scan again and again: work without data.
        let scan = seed
            .bytes
            .windows(2)
            .rposition(|w| w == [0xff, 0xda])
            .unwrap_or(0);
        let again = seed.bytes[scan..seed.bytes.len() - 2].to_vec();
        sized(9, 13, again.repeat(200));
        sized(4000, 4000, again.repeat(1 + 40_000 / again.len()));
        for (at, value) in [
            (4, 12u8),
            (9, 0),
            (9, 255),
            (11, 0x00),
            (11, 0xff),
            (12, 200),
        ] {
            let mut bytes = seed.bytes.clone();
            bytes[frame + at] = value;
            out.push(sample(
                "a.jpg",
                format!("{}: byte {at} of the frame = {value}", seed.name),
                bytes,
            ));
        }
        for marker in [0xc4u8, 0xdb, 0xdd] {
            let mut bytes = seed.bytes.clone();
            let segment = [
                0xff, marker, 0, 20, 0, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255,
                255, 255, 255, 255, 255,
            ];
            bytes.splice(2..2, segment);
            out.push(sample(
                "a.jpg",
                format!("{}: tables {marker:#x} of 255", seed.name),
                bytes,
            ));
        }
        let exif = [
            &[0xff, 0xe1, 0, 20][..],
            b"Exif\0\0II*\0\xff\xff\xff\xff\0\0\0\0",
        ]
        .concat();
        let mut bytes = seed.bytes.clone();
        bytes.splice(2..2, exif);
        out.push(sample(
            "a.jpg",
            format!("{}: an Exif that points nowhere", seed.name),
            bytes,
        ));
    }
    out
}
