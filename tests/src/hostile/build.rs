//! Containers written by hand, so that they may lie: deflate, gzip, PNG, zip, NumPy arrays.

/// The checksum of gzip, zip and PNG.
pub fn crc32(data: &[u8]) -> u32 {
    !data.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

/// Stored deflate blocks.
pub fn stored(data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut pieces = data.chunks(0xffff).peekable();
    if data.is_empty() {
        return vec![1, 0, 0, 0xff, 0xff];
    }
    while let Some(piece) = pieces.next() {
        let length = piece.len() as u16;
        out.push(u8::from(pieces.peek().is_none()));
        out.extend(length.to_le_bytes());
        out.extend((!length).to_le_bytes());
        out.extend(piece);
    }
    out
}

/// Deflate of `1 + 258 n` zeros in 13 bits for each 258 of them: a fixed Huffman block.
pub fn zeros(n: usize) -> Vec<u8> {
    let (mut out, mut word, mut held) = (Vec::new(), 0u64, 0);
    let mut put = |bits: u64, count: u32, out: &mut Vec<u8>| {
        word |= bits << held;
        held += count;
        while held >= 8 {
            out.push(word as u8);
            word >>= 8;
            held -= 8;
        }
    };
    // Last block, fixed codes; then the literal 0. Codes are sent from their first bit.
    put(0b011, 3, &mut out);
    put(0b0000_1100, 8, &mut out);
    for _ in 0..n {
        // Length 258 (code 285 = 11000101), distance 1 (code 0 = 00000).
        put(0b0_0000_1010_0011, 13, &mut out);
    }
    // End of the block (code 256 = 0000000), and the rest of the byte.
    put(0, 7 + 8, &mut out);
    out
}

/// The length of what [`zeros`] unpacks to.
pub fn zeros_len(n: usize) -> u64 {
    1 + 258 * n as u64
}

/// A gzip file around a deflate stream.
pub fn gzip(deflate: &[u8], crc: u32, length: u32) -> Vec<u8> {
    let mut bytes = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
    bytes.extend(deflate);
    bytes.extend(crc.to_le_bytes());
    bytes.extend(length.to_le_bytes());
    bytes
}

/// A gzip file of these bytes.
pub fn gzipped(data: &[u8]) -> Vec<u8> {
    gzip(&stored(data), crc32(data), data.len() as u32)
}

/// A PNG chunk with its checksum.
pub fn chunk(kind: &[u8; 4], body: &[u8]) -> Vec<u8> {
    let named = [&kind[..], body].concat();
    let length = (body.len() as u32).to_be_bytes();
    [&length[..], &named, &crc32(&named).to_be_bytes()].concat()
}

/// The header chunk of a PNG.
pub fn png_header(width: u32, height: u32, depth: u8, color: u8, interlaced: u8) -> Vec<u8> {
    let sizes = [width.to_be_bytes(), height.to_be_bytes()].concat();
    let rest = [depth, color, 0, 0, interlaced];
    chunk(b"IHDR", &[&sizes[..], &rest].concat())
}

/// A PNG of these chunks.
pub fn png(chunks: &[Vec<u8>]) -> Vec<u8> {
    let end = chunk(b"IEND", &[]);
    [b"\x89PNG\r\n\x1a\n", &chunks.concat()[..], &end].concat()
}

/// A zlib stream around deflate; `adler` is its checksum.
pub fn zlib(deflate: &[u8], adler: u32) -> Vec<u8> {
    [&[0x78, 0x01], deflate, &adler.to_be_bytes()].concat()
}

/// The checksum of zlib.
pub fn adler32(data: &[u8]) -> u32 {
    let (a, b) = data.iter().fold((1u32, 0u32), |(a, b), &byte| {
        let a = (a + u32::from(byte)) % 65_521;
        (a, (b + a) % 65_521)
    });
    b << 16 | a
}

/// A member of a zip archive.
#[derive(Clone, Default)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// 0 stored, 8 deflate.
    pub method: u16,
    /// What lies in the archive.
    pub packed: Vec<u8>,
    /// The length that is claimed for the unpacked data.
    pub size: u32,
    /// The checksum of the unpacked data.
    pub crc: u32,
}

impl Member {
    /// A member that is what it says.
    pub fn stored(name: &str, data: &[u8]) -> Self {
        Self {
            name: name.into(),
            method: 0,
            packed: data.to_vec(),
            size: data.len() as u32,
            crc: crc32(data),
        }
    }
}

/// A zip archive.
pub fn zip(members: &[Member]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for member in members {
        let at = out.len() as u32;
        let mut common = vec![20, 0, 0, 0];
        common.extend(member.method.to_le_bytes());
        common.extend([0, 0, 0x21, 0]);
        let sizes = [member.crc, member.packed.len() as u32, member.size];
        common.extend(sizes.map(u32::to_le_bytes).as_flattened());
        common.extend((member.name.len() as u16).to_le_bytes());
        common.extend([0; 2]);
        out.extend(b"PK\x03\x04");
        out.extend(&common);
        out.extend(member.name.as_bytes());
        out.extend(&member.packed);
        directory.extend(b"PK\x01\x02\x14\0");
        directory.extend(&common);
        directory.extend([0; 10]);
        directory.extend(at.to_le_bytes());
        directory.extend(member.name.as_bytes());
    }
    let ends = [directory.len() as u32, out.len() as u32];
    let n = (members.len() as u16).to_le_bytes();
    out.extend(&directory);
    out.extend(b"PK\x05\x06\0\0\0\0");
    out.extend([n, n].as_flattened());
    out.extend(ends.map(u32::to_le_bytes).as_flattened());
    out.extend([0; 2]);
    out
}

/// A NumPy array: `descr` is its element type, `shape` the text of its tuple.
pub fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
    while !(10 + header.len() + 1).is_multiple_of(64) {
        header.push(' ');
    }
    header.push('\n');
    let mut out = b"\x93NUMPY\x01\0".to_vec();
    out.extend((header.len() as u16).to_le_bytes());
    out.extend(header.bytes());
    out.extend(data);
    out
}
