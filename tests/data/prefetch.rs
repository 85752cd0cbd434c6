//! Items made ahead come in order, bounded, with their errors and panics in their place.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use lavender_wgpu::data::prefetch::Prefetch;

/// Later items are ready sooner.
fn uneven(number: u64) -> u64 {
    std::thread::sleep(Duration::from_millis(7 - number % 8));
    number * number
}

#[test]
fn items_come_in_order_whatever_the_threads() {
    for workers in [0, 1, 4] {
        let mut items = Prefetch::new(3..40, workers, 5, uneven);
        let taken: Vec<u64> = std::iter::from_fn(|| items.take()).collect();
        assert_eq!(
            taken,
            (3..40).map(|n| n * n).collect::<Vec<_>>(),
            "{workers}"
        );
        assert_eq!(items.take(), None);
    }
}

#[test]
fn no_more_is_made_than_asked_for() {
    let made = Arc::new(AtomicU64::new(0));
    let counter = made.clone();
    let mut items = Prefetch::new(0..100, 3, 4, move |n| {
        counter.fetch_add(1, Ordering::SeqCst);
        n
    });
    assert_eq!(items.take(), Some(0));
    // Item 0 was taken, so 1 to 4 may be made; that they are is waited for, that no other is cannot come later.
    while made.load(Ordering::SeqCst) < 5 {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(made.load(Ordering::SeqCst), 5);
    // Dropping it with items in the making neither hangs nor makes more.
    drop(items);
    assert_eq!(made.load(Ordering::SeqCst), 5);
}

#[test]
fn an_error_surfaces_at_its_own_item() {
    let mut items = Prefetch::new(0..9, 4, 9, |n| match n {
        3 => Err(format!("item {n}")),
        n => Ok(uneven(n)),
    });
    for n in 0..3 {
        assert_eq!(items.take(), Some(Ok(n * n)));
    }
    assert_eq!(items.take(), Some(Err("item 3".into())));
}

#[test]
fn a_panic_comes_out_where_the_item_is_taken() {
    let mut items = Prefetch::new(0..9, 2, 2, |n| {
        assert!(n != 1, "item one is bad");
        n
    });
    assert_eq!(items.take(), Some(0));
    let panic =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| items.take())).unwrap_err();
    let message = panic.downcast_ref::<&str>();
    assert!(message.is_some_and(|m| m.contains("item one")));
}
