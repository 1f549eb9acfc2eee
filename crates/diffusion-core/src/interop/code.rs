//! The bytes of a pickle's program, read from front to back.

use super::unpickle::Step;

/// The bytes of a program, and where it stands.
pub struct Code<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Code<'a> {
    /// At the beginning of a program.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// How far it has been read.
    pub fn at(&self) -> usize {
        self.at
    }

    /// The next `n` bytes.
    pub fn take(&mut self, n: usize) -> Step<&'a [u8]> {
        let end = self
            .at
            .checked_add(n)
            .filter(|end| *end <= self.bytes.len());
        let end = end.ok_or("a program that breaks off")?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    /// The next byte.
    pub fn byte(&mut self) -> Step<u8> {
        Ok(self.take(1)?[0])
    }

    /// An unsigned number of up to four bytes.
    pub fn number(&mut self, width: usize) -> Step<i64> {
        Ok(self
            .take(width)?
            .iter()
            .rev()
            .fold(0, |n, b| n << 8 | i64::from(*b)))
    }

    /// A signed number of up to eight bytes.
    pub fn long(&mut self, width: usize) -> Step<i64> {
        let bytes = self.take(width)?;
        if width > 8 {
            return Err("a number of more than 64 bits".into());
        }
        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
        let start = if negative { -1 } else { 0 };
        Ok(bytes
            .iter()
            .rev()
            .fold(start, |n, b| n << 8 | i64::from(*b)))
    }

    /// The bytes up to the next line break, which is left out.
    pub fn line(&mut self) -> Step<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let end = rest
            .iter()
            .position(|b| *b == b'\n')
            .ok_or("a program that breaks off")?;
        let line = self.take(end + 1)?;
        Ok(&line[..end])
    }
}
