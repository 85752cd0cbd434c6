use lavender_wgpu::error::Error;
use lavender_wgpu::gpu::{Gpu, GpuOptions, list_adapters};

fn open(adapter: &str) -> Result<Gpu, Error> {
    Gpu::new(&GpuOptions {
        adapter: Some(adapter.to_string()),
        ..GpuOptions::default()
    })
}

#[test]
fn every_listed_adapter_opens_by_index_and_by_part_of_its_name() {
    let adapters = list_adapters();
    assert!(!adapters.is_empty(), "tests need an adapter");
    let first = &adapters[0];
    assert_eq!(first.index, 0);
    assert_eq!(open("0").expect("by index").tier().name, first.tier.name);
    let part: String = first.tier.name.chars().take(5).collect();
    let found = open(&part.to_uppercase()).expect("by name, any case");
    assert!(
        found
            .tier()
            .name
            .to_lowercase()
            .contains(&part.to_lowercase())
    );
}

#[test]
fn an_unknown_adapter_is_refused_with_the_list() {
    let name = list_adapters()[0].tier.name.clone();
    for wanted in ["no such adapter", "99"] {
        match open(wanted).map(|_| ()) {
            Err(Error::NoAdapter(message)) => {
                assert!(
                    message.contains(wanted) && message.contains(&name),
                    "{message}"
                );
            }
            other => panic!("{wanted}: {other:?}"),
        }
    }
}

#[test]
fn the_tier_is_one_line_and_holds_sane_limits() {
    let gpu = crate::support::gpu();
    let tier = gpu.tier();
    let line = tier.to_string();
    assert!(!line.contains('\n') && line.contains(&tier.name), "{line}");
    assert!(tier.max_binding >= 128 << 20 && tier.max_binding <= tier.max_buffer);
    assert!(tier.offset_alignment.is_power_of_two() && tier.offset_alignment <= 256);
    assert!(tier.max_invocations >= 256 && tier.shared_bytes >= 16 << 10);
    if tier.subgroup {
        let (min, max) = tier.subgroup_size;
        assert!(min >= 1 && min <= max && max <= 128, "{min}..{max}");
    }
}
