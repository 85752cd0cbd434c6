//! The page of a store: what it shows, and that a text cannot break out of its place.

use image::{Rgb, RgbImage};
use lavender_wgpu::align::report::{Report, Shown, ShownWord};
use lavender_wgpu::align::store::failures::{Cause, Failure};

fn map(peak: usize) -> Vec<f32> {
    let distance = |a: usize, b: usize| (a as f32 - b as f32).powi(2);
    (0..32 * 32)
        .map(|i| (-(distance(i / 32, peak) + distance(i % 32, peak)) / 30.0).exp())
        .collect()
}

fn failure(id: &str, cause: Cause, reason: &str) -> Failure {
    Failure {
        id: id.into(),
        image: None,
        cause,
        reason: reason.into(),
        shard: Some(0),
    }
}

#[test]
fn the_page_holds_maps_histograms_and_failures_and_escapes_texts() {
    let attack = "<script>alert('x')</script> & \"quotes\"";
    let report = Report {
        title: "Targets in <dir>".into(),
        facts: vec![("teacher".into(), "sd-v1-4 & co".into())],
        entropies: (0..100).map(|i| 4.0 + i as f32 / 50.0).collect(),
        words: vec![2, 3, 7, 7],
        failures: vec![
            failure("b", Cause::Text, "the text \"?!\" has no word"),
            failure("a<b", Cause::Image, "gone.png: No such file"),
            failure("c", Cause::Image, "empty"),
        ],
        samples: vec![Shown {
            id: "s-1".into(),
            caption: attack.into(),
            picture: RgbImage::from_pixel(64, 64, Rgb([200, 10, 10])),
            words: vec![
                ShownWord {
                    text: "circle".into(),
                    map: map(8),
                    entropy: 4.56,
                },
                ShownWord {
                    text: "<b>".into(),
                    map: map(20),
                    entropy: 5.0,
                },
            ],
            more: 3,
        }],
    };
    let page = report.html().unwrap();
    assert!(
        !page.contains("<script")
            && !page.contains("<b>alert")
            && !page.contains("Targets in <dir>")
    );
    assert!(page.contains("&lt;script&gt;alert("), "{page}");
    assert!(page.contains("a&lt;b") && page.contains("sd-v1-4 &amp; co"));
    // A picture and two maps, which differ.
    let pictures: Vec<&str> = page
        .split("src=\"data:image/jpeg;base64,")
        .skip(1)
        .map(|rest| rest.split('"').next().unwrap())
        .collect();
    assert_eq!(pictures.len(), 3);
    assert!(pictures[0] != pictures[1] && pictures[1] != pictures[2]);
    for picture in &pictures {
        use base64::Engine;
        let bytes = base64::engine::general_purpose::STANDARD
            .decode(picture)
            .unwrap();
        let picture = image::load_from_memory(&bytes).unwrap();
        assert_eq!((picture.width(), picture.height()), (64, 64));
    }
    for part in [
        "circle",
        "4.56",
        "and 3 more words",
        "2 × image that cannot be read",
        "1 × text without a word",
    ] {
        assert!(page.contains(part), "{part} in {page}");
    }
    // Two histograms, and no address of anything outside the page but SVG's own name.
    assert_eq!(page.matches("<svg").count(), 2);
    assert!(page.matches("<rect").count() > 20);
    let outside = page.replace("http://www.w3.org/2000/svg", "");
    assert!(
        !outside.contains("http") && !outside.contains("href"),
        "{outside}"
    );
    // Every element that opens closes.
    for tag in [
        "article", "figure", "table", "details", "svg", "div", "body", "html",
    ] {
        let opens =
            page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
        assert_eq!(opens, page.matches(&format!("</{tag}>")).count(), "{tag}");
    }
}

#[test]
fn a_page_without_any_sample_is_one_too() {
    let page = Report::default().html().unwrap();
    assert!(page.contains("Every sample that was tried has targets"));
    assert_eq!(page.matches("<svg").count(), 2);
}
