//! The generator of the malformed files, and what the message about each must say.
//!
//! Checksums and stored (uncompressed) deflate blocks are written by hand, so that the bytes do
//! not depend on the version of a compression library.

/// One malformed file.
pub struct Case {
    /// Its path in the corpus; the folder says the format.
    pub name: &'static str,
    /// Its content.
    pub bytes: Vec<u8>,
    /// What the message must contain, beside the file's name.
    pub clues: &'static [&'static str],
}

fn case(name: &'static str, bytes: Vec<u8>, clues: &'static [&'static str]) -> Case {
    Case { name, bytes, clues }
}

/// All malformed files.
pub fn cases() -> Vec<Case> {
    let mut cases = idx_cases();
    cases.extend(png_cases());
    cases.extend(jpeg_cases());
    cases
}

/// An IDX file of bytes.
pub fn idx(magic: [u8; 4], sizes: &[u32], data: &[u8]) -> Vec<u8> {
    let sizes = sizes.iter().flat_map(|size| size.to_be_bytes());
    magic
        .into_iter()
        .chain(sizes)
        .chain(data.iter().copied())
        .collect()
}

/// The magic number of images.
pub const IMAGES: [u8; 4] = [0, 0, 8, 3];
/// The magic number of labels.
pub const LABELS: [u8; 4] = [0, 0, 8, 1];

fn idx_cases() -> Vec<Case> {
    let good = || idx(IMAGES, &[2, 2, 3], &[7; 12]);
    let absurd = || idx(IMAGES, &[u32::MAX, 28, 28], &[0; 28]);
    let cut = |mut bytes: Vec<u8>, n: usize| {
        bytes.truncate(bytes.len() - n);
        bytes
    };
    let mut damaged = gzip(&good());
    let end = damaged.len() - 8;
    damaged[end] ^= 1;
    vec![
        case("idx/empty", vec![], &["empty file", "magic", "download"]),
        case(
            "idx/absurd-count",
            absurd(),
            &["4294967295x28x28", "expected a file of"],
        ),
        case(
            "idx/absurd-count.gz",
            gzip(&absurd()),
            &["4294967295x28x28", "gzip file"],
        ),
        case(
            "idx/absurd-side",
            idx(IMAGES, &[1, u32::MAX, u32::MAX], &[]),
            &["1x4294967295x4294967295", "16384x16384", "smaller images"],
        ),
        case(
            "idx/side-above-limit",
            idx(IMAGES, &[1, 16_385, 1], &[0; 99]),
            &["16384x16384"],
        ),
        case(
            "idx/image-above-64-mib.gz",
            gzip(&idx(IMAGES, &[1, 8192, 8193], &[])),
            &["1x8192x8193", "67108864 bytes"],
        ),
        case(
            "idx/no-images",
            idx(IMAGES, &[0, 28, 28], &[]),
            &["0x28x28", "at least 1"],
        ),
        case(
            "idx/no-columns",
            idx(IMAGES, &[3, 28, 0], &[]),
            &["3x28x0", "at least 1"],
        ),
        case(
            "idx/one-byte-short",
            cut(good(), 1),
            &["28 bytes instead of 27", "download"],
        ),
        case(
            "idx/one-byte-more",
            idx(IMAGES, &[2, 2, 3], &[7; 13]),
            &["28 bytes instead of 29", "download"],
        ),
        case(
            "idx/labels",
            idx(LABELS, &[4], &[1, 2, 3, 4]),
            &["00 00 08 01", "labels file"],
        ),
        case(
            "idx/floats",
            idx([0, 0, 0x0d, 3], &[1, 1, 1], &[0; 4]),
            &["00 00 0d 03", "expected 00 00 08 03"],
        ),
        case(
            "idx/text",
            b"label,pixel1,pixel2\n".to_vec(),
            &["6c 61 62 65", "IDX"],
        ),
        case(
            "idx/picture",
            png(2, 2, 8, 0, &[0; 6]),
            &["89 50 4e 47", "give the folder"],
        ),
        case(
            "idx/cut-in-stream.gz",
            cut(gzip(&good()), 15),
            &["damaged gzip stream", "download"],
        ),
        case(
            "idx/cut-in-checksum.gz",
            cut(gzip(&good()), 3),
            &["damaged gzip stream"],
        ),
        case(
            "idx/wrong-checksum.gz",
            damaged,
            &["damaged gzip stream", "complete gzip file"],
        ),
        case(
            "idx/short-inside.gz",
            gzip(&cut(good(), 2)),
            &["ends after 26 bytes", "28 bytes as the header claims"],
        ),
        case(
            "idx/more-inside.gz",
            gzip(&idx(IMAGES, &[2, 2, 3], &[7; 14])),
            &["more data than the header claims", "28 bytes"],
        ),
        case(
            "idx/only-the-gzip-magic.gz",
            vec![0x1f, 0x8b],
            &["gzip", "download"],
        ),
        case("idx/gzip-of-nothing.gz", gzip(&[]), &["magic"]),
    ]
}

fn png_cases() -> Vec<Case> {
    let good = || png(2, 2, 8, 0, &[0, 1, 2, 0, 3, 4]);
    let mut wrong_crc = good();
    wrong_crc[30] ^= 1;
    let mut wrong_data = good();
    let data = wrong_data.len() - 12 - 9;
    wrong_data[data] ^= 1;
    let swap = |from: &[u8], to: &[u8]| {
        let bytes = good();
        let at = bytes
            .windows(from.len())
            .position(|w| w == from)
            .unwrap_or(0);
        [&bytes[..at], to, &bytes[at + from.len()..]].concat()
    };
    let two_headers = {
        let bytes = good();
        [&bytes[..33], &bytes[8..]].concat()
    };
    vec![
        case("png/empty.png", vec![], &["empty file", "image data"]),
        case(
            "png/text.png",
            b"this is not a picture\n".to_vec(),
            &["text file", "PNG or JPEG"],
        ),
        case(
            "png/gif.png",
            b"GIF89a\x01\x00\x01\x00".to_vec(),
            &["GIF", "convert"],
        ),
        case(
            "png/webp.png",
            b"RIFF\x04\0\0\0WEBPVP8L".to_vec(),
            &["WebP", "convert"],
        ),
        case(
            "png/signature-only.png",
            png_signature(),
            &["ends early", "IEND"],
        ),
        case(
            "png/65535-squared.png",
            png(65_535, 65_535, 8, 6, &[]),
            &["65535x65535", "16384x16384"],
        ),
        case(
            "png/20000-squared.png",
            png(20_000, 20_000, 8, 0, &[]),
            &["20000x20000", "make the image smaller"],
        ),
        case(
            "png/2147483647-squared.png",
            png(0x7fff_ffff, 0x7fff_ffff, 16, 6, &[]),
            &["2147483647x2147483647", "16384x16384"],
        ),
        case(
            "png/above-64-mib.png",
            png(8192, 8193, 8, 0, &[]),
            &["8192x8193 pixels (67117056 bytes)", "67108864 bytes"],
        ),
        case(
            "png/claims-more-than-its-data.png",
            png(8192, 8192, 8, 0, &[0; 64]),
            &["compressed data for an image of 67117056 bytes", "at least"],
        ),
        case(
            "png/no-width.png",
            png(0, 5, 8, 0, &[]),
            &["0x5", "at least 1x1"],
        ),
        case(
            "png/16-bit-palette.png",
            png(2, 2, 16, 3, &[0; 10]),
            &["damaged or unusual PNG"],
        ),
        case(
            "png/3-bits.png",
            png(2, 2, 3, 0, &[0; 4]),
            &["3 bits", "1, 2, 4, 8 or 16"],
        ),
        case(
            "png/colour-type-5.png",
            png(2, 2, 8, 5, &[0; 4]),
            &["colour type 5", "0, 2, 3"],
        ),
        case(
            "png/palette-missing.png",
            png(2, 2, 8, 3, &[0; 6]),
            &["damaged or unusual PNG"],
        ),
        case(
            "png/wrong-header-checksum.png",
            wrong_crc,
            &["damaged or unusual PNG", "replace"],
        ),
        case(
            "png/wrong-data-checksum.png",
            wrong_data,
            &["damaged or unusual PNG", "replace"],
        ),
        case(
            "png/too-few-rows.png",
            png(2, 3, 8, 0, &[0; 6]),
            &["damaged or unusual PNG"],
        ),
        case(
            "png/no-end.png",
            good()[..good().len() - 12].to_vec(),
            &["ends early", "IEND"],
        ),
        case(
            "png/no-header.png",
            swap(b"IHDR", b"tEXt"),
            &["first chunk", "IHDR"],
        ),
        case("png/two-headers.png", two_headers, &["second IHDR"]),
        case(
            "png/no-data.png",
            png_chunks(&[header(2, 2, 8, 0)]),
            &["damaged or unusual PNG"],
        ),
        case(
            "png/short-header.png",
            png_chunks(&[chunk(b"IHDR", &[0; 5])]),
            &["IHDR of 5 bytes"],
        ),
        case(
            "png/chunk-past-the-end.png",
            swap(b"\0\0\0\0IEND", b"\x7f\xff\xff\xffIEND"),
            &["IEND", "claims 2147483647 bytes", "past the end"],
        ),
    ]
}

fn jpeg_cases() -> Vec<Case> {
    let segment = |marker: u8, body: &[u8]| {
        let length = (body.len() as u16 + 2).to_be_bytes();
        [&[0xff, marker], &length[..], body].concat()
    };
    let frame = |height: u16, width: u16| {
        let [h1, h0] = height.to_be_bytes();
        let [w1, w0] = width.to_be_bytes();
        segment(0xc0, &[8, h1, h0, w1, w0, 1, 1, 0x11, 0])
    };
    let scan = || segment(0xda, &[1, 1, 0, 0, 63, 0]);
    let file = |parts: &[Vec<u8>]| {
        let mut bytes = vec![0xff, 0xd8];
        bytes.extend(parts.concat());
        bytes.extend([0xff, 0xd9]);
        bytes
    };
    vec![
        case(
            "jpeg/start-only.jpg",
            vec![0xff, 0xd8],
            &["ends early", "EOI"],
        ),
        case(
            "jpeg/nothing-inside.jpg",
            file(&[]),
            &["before any image data", "a scan"],
        ),
        case(
            "jpeg/no-scan.jpg",
            file(&[frame(8, 8)]),
            &["before any image data"],
        ),
        case(
            "jpeg/no-frame.jpg",
            file(&[scan(), vec![1, 2]]),
            &["before any image data"],
        ),
        case(
            "jpeg/no-tables.jpg",
            file(&[frame(8, 8), scan(), vec![1, 2]]),
            &["unusual JPEG"],
        ),
        case(
            "jpeg/65535-squared.jpg",
            file(&[frame(65_535, 65_535), scan(), vec![0; 9]]),
            &["65535x65535", "16384x16384"],
        ),
        case(
            "jpeg/claims-more-than-its-data.jpg",
            file(&[frame(8000, 8000), scan(), vec![0; 9]]),
            &["8000x8000", "at least 640000 bytes"],
        ),
        case(
            "jpeg/no-height.jpg",
            file(&[frame(0, 9), scan(), vec![0]]),
            &["9x0", "1x1"],
        ),
        case(
            "jpeg/two-frames.jpg",
            file(&[frame(8, 8), frame(8, 8), scan()]),
            &["second frame"],
        ),
        case(
            "jpeg/segment-past-the-end.jpg",
            vec![0xff, 0xd8, 0xff, 0xe0, 0xff, 0xff, 0],
            &["0xe0", "claims 65535 bytes"],
        ),
        case(
            "jpeg/segment-of-length-1.jpg",
            vec![0xff, 0xd8, 0xff, 0xe0, 0, 1, 0],
            &["claims 1 bytes"],
        ),
        case(
            "jpeg/no-marker.jpg",
            vec![0xff, 0xd8, 0x12, 0x34],
            &["0x12", "a marker"],
        ),
    ]
}

/// A gzip file of one stored block.
pub fn gzip(data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
    bytes.extend(stored(data));
    bytes.extend(crc32(data).to_le_bytes());
    bytes.extend((data.len() as u32).to_le_bytes());
    bytes
}

/// A PNG whose scan lines, filter bytes included, are `raw`, whatever the header promises.
pub fn png(width: u32, height: u32, depth: u8, color: u8, raw: &[u8]) -> Vec<u8> {
    let zlib = [&[0x78, 0x01], &stored(raw)[..], &adler32(raw).to_be_bytes()].concat();
    png_chunks(&[header(width, height, depth, color), chunk(b"IDAT", &zlib)])
}

fn png_signature() -> Vec<u8> {
    b"\x89PNG\r\n\x1a\n".to_vec()
}

fn png_chunks(chunks: &[Vec<u8>]) -> Vec<u8> {
    [png_signature(), chunks.concat(), chunk(b"IEND", &[])].concat()
}

fn header(width: u32, height: u32, depth: u8, color: u8) -> Vec<u8> {
    let sizes = [width.to_be_bytes(), height.to_be_bytes()].concat();
    chunk(b"IHDR", &[&sizes[..], &[depth, color, 0, 0, 0]].concat())
}

fn chunk(kind: &[u8; 4], body: &[u8]) -> Vec<u8> {
    let named = [&kind[..], body].concat();
    [
        &(body.len() as u32).to_be_bytes()[..],
        &named,
        &crc32(&named).to_be_bytes(),
    ]
    .concat()
}

fn stored(data: &[u8]) -> Vec<u8> {
    let length = data.len() as u16;
    [
        &[1],
        &length.to_le_bytes()[..],
        &(!length).to_le_bytes(),
        data,
    ]
    .concat()
}

/// The checksum of gzip and PNG.
pub fn crc32(data: &[u8]) -> u32 {
    !data.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            if crc & 1 == 1 {
                (crc >> 1) ^ 0xedb8_8320
            } else {
                crc >> 1
            }
        })
    })
}

fn adler32(data: &[u8]) -> u32 {
    let (a, b) = data.iter().fold((1u32, 0u32), |(a, b), &byte| {
        let a = (a + u32::from(byte)) % 65_521;
        (a, (b + a) % 65_521)
    });
    b << 16 | a
}
