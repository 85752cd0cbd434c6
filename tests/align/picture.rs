//! Pictures of word maps.

use image::{Rgb, RgbImage};
use lavender_wgpu::align::picture::{
    CELL, WordMaps, file_stem, heat, overlay, save_png, word_sheet,
};

fn corner() -> Vec<f32> {
    let mut map = vec![0.0; 32 * 32];
    for y in 0..8 {
        for x in 24..32 {
            map[y * 32 + x] = 1.0;
        }
    }
    map
}

fn luma(p: &Rgb<u8>) -> u32 {
    p.0.iter().map(|&c| u32::from(c)).sum()
}

#[test]
fn high_is_bright_and_in_its_place() {
    let picture = heat(&corner(), 100, 60);
    assert_eq!(picture.dimensions(), (100, 60));
    assert!(luma(picture.get_pixel(95, 5)) > 600 && luma(picture.get_pixel(5, 55)) < 20);
    let odd = heat(&[f32::NAN, 2.0, -3.0, 0.5], 2, 2);
    assert_eq!(odd.get_pixel(0, 0), odd.get_pixel(0, 1));
}

#[test]
fn an_overlay_keeps_the_image_where_the_map_is_zero() {
    let image = RgbImage::from_fn(
        64,
        64,
        |x, _| if x < 32 { Rgb([0; 3]) } else { Rgb([200; 3]) },
    );
    let picture = overlay(&image, &corner());
    assert_eq!(picture.get_pixel(2, 60).0, [0, 0, 0]);
    let kept = picture.get_pixel(60, 60).0;
    assert!(kept[0] == kept[1] && kept[1] == kept[2] && kept[0] == 160);
    let coloured = picture.get_pixel(60, 4).0;
    assert!(coloured[0] > coloured[2] + 40, "{coloured:?}");
}

#[test]
fn a_sheet_has_a_column_per_kind_of_map_and_a_written_word_per_row() {
    let image = RgbImage::from_pixel(40, 30, Rgb([90, 120, 30]));
    let map = corner();
    let word = |word, after| WordMaps {
        word,
        target: Some(&map),
        before: None,
        after,
    };
    let page = word_sheet(
        &image,
        &[
            word("ball", Some(&map[..])),
            word("überlanges-Wort-das-nicht-passt", None),
        ],
    );
    let (width, height) = page.dimensions();
    assert_eq!(width, 3 * (CELL + 16));
    assert_eq!(height, 30 + 2 * (CELL + 30));
    // The second row's last cell is empty paper, word included; its first has ink under the picture.
    let ink = |column: u32, row: u32| {
        let (left, top) = (column * (CELL + 16), 30 + row * (CELL + 30) + CELL);
        (left..left + CELL + 16)
            .flat_map(|x| (top..top + 22).map(move |y| (x, y)))
            .filter(|&(x, y)| luma(page.get_pixel(x, y)) < 300)
            .count()
    };
    assert!(ink(0, 0) > 20 && ink(2, 0) > 20 && ink(0, 1) > 20);
    assert_eq!(ink(2, 1), 0);
}

#[test]
fn pictures_are_written_under_safe_names() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir
        .path()
        .join("maps")
        .join(format!("{}.png", file_stem("a/b:\\c")));
    save_png(&path, &heat(&corner(), 32, 32)).unwrap();
    assert_eq!(path.file_name().unwrap(), "a_b__c.png");
    assert_eq!(image::open(&path).unwrap().width(), 32);
}
