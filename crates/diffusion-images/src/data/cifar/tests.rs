//! Files of CIFAR-10: what is read, and what is refused.

use super::super::{Options, open, splits};
use super::*;
use flate2::{Compression, write::GzEncoder};
use std::io::Write;

fn records(labels: &[u8], seed: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (i, &label) in labels.iter().enumerate() {
        bytes.push(label);
        bytes.extend((0..IMAGE).map(|v| (v / 1024 * 80) as u8 + seed + i as u8));
    }
    bytes
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gz = GzEncoder::new(Vec::new(), Compression::best());
    gz.write_all(bytes).unwrap();
    gz.finish().unwrap()
}

fn error(path: &Path) -> Error {
    open(path.to_str().unwrap()).unwrap_err()
}

#[test]
fn a_folder_has_batches_a_test_batch_and_names() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
    write("data_batch_1.bin", &records(&[3, 9], 0));
    write("data_batch_2.bin.gz", &gzip(&records(&[0], 10)));
    write("readme.html", b"text");
    let spec = folder.path().to_str().unwrap();
    let data = open(spec).unwrap();
    assert_eq!(data.labels().unwrap(), [3, 9, 0]);
    assert_eq!(data.classes()[9], "9");
    assert_eq!((data.channels(), data.height(), data.width()), (3, 32, 32));
    let Pixels::Levels { values, .. } = data.pixels() else {
        unreachable!("levels");
    };
    // Red, green, blue of each image; the label is no pixel.
    let ends = [0, 1023, 1024, 3071].map(|v| values[v]);
    assert_eq!(ends, [0, 0, 80, 160]);
    assert_eq!((values[IMAGE], values[2 * IMAGE + 2048]), (1, 170));
    assert_eq!(values.len(), 3 * IMAGE);
    // Without a test batch the images are divided by hash.
    let sides = splits(spec, &Options::default()).unwrap();
    assert_eq!(sides.train.len() + sides.test.len(), 3);
    write("test_batch.bin", &records(&[5], 20));
    write("batches.meta.txt", b"a\nb\nc\nd\ne\nf\ng\nh\ni\nj\n\n");
    let sides = splits(spec, &Options::default()).unwrap();
    assert_eq!(sides.train.labels().unwrap(), [3, 9, 0]);
    assert_eq!(sides.test.labels().unwrap(), [5]);
    assert_eq!(sides.test.classes()[5], "f");
    assert_eq!(open(spec).unwrap().labels().unwrap(), [3, 9, 0, 5]);
    write("batches.meta.txt", b"a\nb\n");
    assert!(error(folder.path()).to_string().contains("2 names"));
    write("data_batch_2.bin", &records(&[0], 10));
    assert!(error(folder.path()).to_string().contains("the same batch"));
}

#[test]
fn every_cut_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data_batch_1.bin");
    let whole = records(&[1], 0);
    std::fs::write(&path, &whole).unwrap();
    assert_eq!(open(path.to_str().unwrap()).unwrap().len(), 1);
    for length in 0..whole.len() {
        std::fs::write(&path, &whole[..length]).unwrap();
        assert!(matches!(error(&path), Error::Input(_)), "{length}");
    }
    let path = folder.path().join("x.bin.gz");
    let whole = gzip(&whole);
    for length in 0..whole.len() {
        std::fs::write(&path, &whole[..length]).unwrap();
        assert!(matches!(error(&path), Error::Input(_)), "{length}");
    }
    std::fs::write(&path, &whole).unwrap();
    assert_eq!(open(path.to_str().unwrap()).unwrap().len(), 1);
}

#[test]
fn labels_and_other_formats_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.bin");
    std::fs::write(&path, records(&[9, 10], 0)).unwrap();
    let message = error(&path).to_string();
    assert!(message.contains("label 10 in record 1"), "{message}");
    std::fs::write(&path, vec![0; 2 * (RECORD + 1)]).unwrap();
    assert!(error(&path).to_string().contains("CIFAR-100"));
}

#[test]
fn a_gzip_file_may_not_unpack_absurdly() {
    // Just below and just above what is allowed, whatever the ratio.
    let path = Path::new("x.bin.gz");
    let zeros = vec![0u8; 2 * RECORD];
    let length = zeros.len() as u64;
    assert_eq!(scan(path, zeros.as_slice(), length).unwrap(), length);
    assert_eq!(unpack(path, zeros.as_slice(), length).unwrap(), zeros);
    assert!(matches!(
        scan(path, zeros.as_slice(), length - 1),
        Err(Error::Limit(_))
    ));
    let mut bad = zeros.clone();
    bad[RECORD] = 10;
    let message = scan(path, bad.as_slice(), length).unwrap_err().to_string();
    assert!(message.contains("label 10 in record 1"), "{message}");
    let folder = tempfile::tempdir().unwrap();
    let bomb = folder.path().join("bomb.bin.gz");
    let count = MAX_IMAGE_BYTES as usize / RECORD + 1;
    std::fs::write(&bomb, gzip(&vec![0; count * RECORD])).unwrap();
    assert!(matches!(error(&bomb), Error::Limit(_)));
}
