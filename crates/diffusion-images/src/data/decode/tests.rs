//! Every kind of pixel that PNG and JPEG know, against values computed by hand.

use super::*;

#[test]
fn alpha_is_composed_on_white() {
    let mut rgba = vec![10, 20, 30, 0, 10, 20, 30, 255, 100, 0, 255, 51];
    flatten(&mut rgba, 4, false, [255; 3]);
    // The third pixel: 0.2 c + 0.8 · 255.
    assert_eq!(rgba, [255, 255, 255, 10, 20, 30, 224, 204, 255]);
    let mut grey = vec![0, 128, 77, 255];
    flatten(&mut grey, 2, false, [255; 3]);
    assert_eq!(grey, [127, 77]);
}

#[test]
fn sixteen_bits_are_rounded_not_cut() {
    let values = [0u16, 128, 129, 257, 65_535, 65_406, 32_767];
    let mut bytes: Vec<u8> = values.iter().flat_map(|v| v.to_ne_bytes()).collect();
    flatten(&mut bytes, 1, true, [255; 3]);
    let expected: Vec<u8> = values
        .iter()
        .map(|&v| (f64::from(v) / 257.0).round() as u8)
        .collect();
    assert_eq!(bytes, expected);
    let mut rgba: Vec<u8> = [65_535u16, 0, 1000, 0, 0, 25_700, 65_535, 65_535]
        .map(u16::to_ne_bytes)
        .concat();
    flatten(&mut rgba, 4, true, [255; 3]);
    assert_eq!(rgba, [255, 255, 255, 0, 100, 255]);
}

#[test]
fn grey_is_bt601_and_planes_are_separated() {
    let picture = Pixmap {
        width: 2,
        height: 1,
        channels: 3,
        pixels: vec![255, 0, 0, 1, 2, 3],
    };
    let mut planes = Vec::new();
    picture.append_planes(3, &mut planes);
    assert_eq!(planes, [255, 1, 0, 2, 0, 3]);
    let grey = picture.into_grey();
    assert_eq!(grey.pixels, [76, 2]);
    let mut planes = Vec::new();
    grey.append_planes(3, &mut planes);
    assert_eq!(planes, [76, 2, 76, 2, 76, 2]);
}

#[test]
fn resizing_crops_the_centre_and_keeps_a_constant() {
    let mut wide = GrayImage::from_pixel(12, 4, image::Luma([0]));
    for y in 0..4 {
        for x in 4..8 {
            wide.put_pixel(x, y, image::Luma([200]));
        }
    }
    let small = resize(DynamicImage::ImageLuma8(wide), 2, &Conversion::default()).into_luma8();
    assert_eq!(small.into_raw(), [200; 4]);
}

/// A PNG file of the given kind.
fn png_file(
    color: png::ColorType,
    depth: png::BitDepth,
    size: (u32, u32),
    palette: Option<(&[u8], Option<&[u8]>)>,
    transparent: Option<&[u8]>,
    data: &[u8],
) -> Vec<u8> {
    let mut out = Vec::new();
    let mut encoder = png::Encoder::new(&mut out, size.0, size.1);
    encoder.set_color(color);
    encoder.set_depth(depth);
    if let Some((colors, alpha)) = palette {
        encoder.set_palette(colors.to_vec());
        if let Some(alpha) = alpha {
            encoder.set_trns(alpha.to_vec());
        }
    }
    if let Some(value) = transparent {
        encoder.set_trns(value.to_vec());
    }
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(data).unwrap();
    writer.finish().unwrap();
    out
}

fn pixels(bytes: &[u8], background: [u8; 3]) -> (usize, Vec<u8>) {
    let conversion = Conversion {
        background,
        ..Conversion::default()
    };
    let picture = from_bytes(Path::new("x.png"), bytes, &conversion).unwrap();
    (picture.channels, picture.pixels)
}

#[test]
fn every_kind_of_png_is_converted_as_the_table_says() {
    use png::BitDepth::{Eight, Four, One, Sixteen, Two};
    use png::ColorType::{Grayscale, GrayscaleAlpha, Indexed, Rgb, Rgba};
    let white = [255; 3];
    let plain = |color, depth, size, data: &[u8]| {
        pixels(&png_file(color, depth, size, None, None, data), white)
    };
    assert_eq!(
        plain(Grayscale, One, (2, 1), &[0b0100_0000]),
        (1, vec![0, 255])
    );
    assert_eq!(
        plain(Grayscale, Two, (4, 1), &[0b0001_1011]),
        (1, vec![0, 85, 170, 255])
    );
    assert_eq!(plain(Grayscale, Four, (2, 1), &[0x1e]), (1, vec![17, 238]));
    assert_eq!(
        plain(Grayscale, Eight, (2, 1), &[3, 200]),
        (1, vec![3, 200])
    );
    // 0x0080 = 128 and 0x0081 = 129 lie on either side of 257 / 2.
    let deep = [0, 0x80, 0, 0x81, 0xff, 0xff];
    assert_eq!(
        plain(Grayscale, Sixteen, (3, 1), &deep),
        (1, vec![0, 1, 255])
    );
    assert_eq!(
        plain(GrayscaleAlpha, Eight, (2, 1), &[0, 128, 7, 255]),
        (1, vec![127, 7])
    );
    assert_eq!(plain(Rgb, Eight, (1, 1), &[1, 2, 3]), (3, vec![1, 2, 3]));
    let deep = [0, 0x80, 0, 0x81, 0xff, 0xff];
    assert_eq!(plain(Rgb, Sixteen, (1, 1), &deep), (3, vec![0, 1, 255]));
    assert_eq!(
        plain(Rgba, Eight, (1, 1), &[100, 0, 255, 51]),
        (3, vec![224, 204, 255])
    );
    let half = [0, 0, 0, 0, 0xff, 0xff, 0x80, 0];
    assert_eq!(
        plain(Rgba, Sixteen, (1, 1), &half),
        (3, vec![127, 127, 255])
    );
    let colors: &[u8] = &[10, 20, 30, 40, 50, 60];
    let indexed = |alpha, background| {
        let palette = Some((colors, alpha));
        let file = png_file(Indexed, One, (2, 1), palette, None, &[0b0100_0000]);
        pixels(&file, background)
    };
    assert_eq!(indexed(None, white), (3, colors.to_vec()));
    let alpha: Option<&[u8]> = Some(&[0]);
    assert_eq!(indexed(alpha, [1, 2, 3]), (3, vec![1, 2, 3, 40, 50, 60]));
    let keyed = png_file(Grayscale, Eight, (2, 1), None, Some(&[0, 9]), &[9, 8]);
    assert_eq!(pixels(&keyed, [100; 3]), (1, vec![100, 8]));
    assert_eq!(pixels(&keyed, [1, 2, 3]), (3, vec![1, 2, 3, 8, 8, 8]));
    let keyed = png_file(
        Rgb,
        Eight,
        (2, 1),
        None,
        Some(&[0, 1, 0, 2, 0, 3]),
        &[1, 2, 3, 1, 2, 4],
    );
    assert_eq!(pixels(&keyed, white), (3, vec![255, 255, 255, 1, 2, 4]));
}

#[test]
fn a_jpeg_keeps_its_channels() {
    for (color, channels) in [
        (image::ExtendedColorType::L8, 1),
        (image::ExtendedColorType::Rgb8, 3),
    ] {
        let mut out = Vec::new();
        image::codecs::jpeg::JpegEncoder::new_with_quality(&mut out, 100)
            .encode(&vec![100; 64 * channels], 8, 8, color)
            .unwrap();
        let (found, values) = pixels(&out, [0; 3]);
        assert_eq!(found, channels);
        assert!(values.iter().all(|&v| v.abs_diff(100) <= 2), "{values:?}");
    }
}
