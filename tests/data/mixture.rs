//! Several data sets as one: order, weights, resumption.

use std::collections::BTreeMap;

use lavender_wgpu::data::{DataSet, ImageRef, Sample};

fn set(name: &str, count: usize) -> DataSet {
    let sample =
        |i: usize| Sample::question(i.to_string(), ImageRef::Path("i.png".into()), "q", "a");
    DataSet::new(name, (0..count).map(sample).collect()).unwrap()
}

fn counts(order: &[usize]) -> BTreeMap<usize, usize> {
    let mut counts = BTreeMap::new();
    for &index in order {
        *counts.entry(index).or_default() += 1;
    }
    counts
}

#[test]
fn weights_are_passes_over_each_set() {
    let mixed = DataSet::mixture(vec![
        (set("a", 10), 0.5),
        (set("b", 4), 2.0),
        (set("c", 3), 1.0),
    ]);
    assert_eq!((mixed.samples.len(), mixed.epoch_len()), (17, 5 + 8 + 3));
    assert_eq!(
        [0, 9, 10, 13, 14, 16].map(|i| mixed.share_of(i)),
        [0, 0, 1, 1, 2, 2]
    );
    let (first, second) = (mixed.order(3, 0, true), mixed.order(3, 1, true));
    assert_eq!(first.len(), 16);
    for order in [&first, &second] {
        let counts = counts(order);
        assert!((10..14).all(|i| counts[&i] == 2) && (14..17).all(|i| counts[&i] == 1));
    }
    // Two epochs of one half each are one pass.
    let halves: Vec<usize> = [&first[..], &second[..]]
        .concat()
        .into_iter()
        .filter(|&i| i < 10)
        .collect();
    assert_eq!(counts(&halves), (0..10).map(|i| (i, 1)).collect());
    // The sets are mixed, not one after the other.
    assert!(
        first
            .windows(2)
            .filter(|w| mixed.share_of(w[0]) != mixed.share_of(w[1]))
            .count()
            > 4
    );
    // Any epoch can be had without those before it, which is what a resumed run does.
    assert_eq!(mixed.order(3, 1, true), second);
    assert_ne!(mixed.order(4, 1, true), second);
    // Without shuffling: the files' order, a half going on where the last ended.
    let plain = mixed.order(3, 1, false);
    assert_eq!(&plain[..7], &[5, 6, 7, 8, 9, 10, 11]);
}

#[test]
fn one_set_of_weight_one_is_as_without_a_mixture() {
    let mixed = DataSet::mixture(vec![(set("a", 30), 1.0)]);
    for epoch in 0..3 {
        assert_eq!(
            mixed.order(5, epoch, true),
            set("a", 30).order(5, epoch, true)
        );
    }
}

#[test]
fn leaving_samples_out_moves_the_shares() {
    let mut mixed = DataSet::mixture(vec![(set("a", 4), 1.0), (set("b", 3), 1.0)]);
    mixed.keep(&[true, false, false, true, false, true, true]);
    let ids: Vec<&str> = mixed.samples.iter().map(|s| s.id.as_str()).collect();
    assert_eq!(ids, ["0", "3", "1", "2"]);
    assert_eq!([0, 1, 2, 3].map(|i| mixed.share_of(i)), [0, 0, 1, 1]);
    assert_eq!(mixed.order(0, 0, false), [0, 1, 2, 3]);
    mixed.keep(&[false, false, true, true]);
    assert_eq!((mixed.share_of(0), mixed.epoch_len()), (1, 2));
    assert_eq!(mixed.order(0, 0, false), [0, 1]);
}
