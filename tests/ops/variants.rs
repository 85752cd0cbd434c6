//! Every kernel variant validates and translates to SPIR-V, MSL and HLSL.

use lavender_wgpu::gpu::{ShaderLibrary, stitched_wgsl};
use lavender_wgpu::ops;
use naga::back::{hlsl, msl, spv};
use naga::valid::{Capabilities, ValidationFlags, Validator};

#[test]
fn every_variant_translates_to_every_backend() {
    let mut library = ShaderLibrary::new(false).expect("common files");
    let variants = ops::variants();
    assert!(!variants.is_empty());
    for kernel in variants {
        let name = format!("{} {:?}", kernel.label(), kernel.defs);
        let module = library
            .compose(&kernel)
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        let info = Validator::new(ValidationFlags::all(), Capabilities::all())
            .validate(&module)
            .unwrap_or_else(|e| panic!("{name}: {e:?}"));
        let constants = kernel
            .constants
            .iter()
            .map(|&(n, v)| (n.to_string(), v))
            .collect();
        let (module, info) =
            naga::back::pipeline_constants::process_overrides(&module, &info, None, &constants)
                .unwrap_or_else(|e| panic!("{name}: {e:?}"));
        stitched_wgsl(&module).unwrap_or_else(|e| panic!("{name}: {e}"));
        let words = spv::write_vec(&module, &info, &spv::Options::default(), None)
            .unwrap_or_else(|e| panic!("{name}: SPIR-V: {e:?}"));
        assert_eq!(words[0], 0x0723_0203, "{name}: SPIR-V magic");
        let options = msl::Options {
            lang_version: (3, 0),
            fake_missing_bindings: true,
            ..Default::default()
        };
        let (text, _) = msl::write_string(&module, &info, &options, &Default::default())
            .unwrap_or_else(|e| panic!("{name}: MSL: {e:?}"));
        assert!(text.contains("kernel void"), "{name}: MSL entry point");
        // Cooperative matrices have no HLSL: another tier serves there.
        if kernel.file.ends_with("_cooperative") {
            continue;
        }
        let mut text = String::new();
        let options = hlsl::Options {
            shader_model: hlsl::ShaderModel::V6_2,
            fake_missing_bindings: true,
            immediates_target: Some(hlsl::BindTarget::default()),
            ..Default::default()
        };
        hlsl::Writer::new(&mut text, &options, &Default::default())
            .write(&module, &info, None)
            .unwrap_or_else(|e| panic!("{name}: HLSL: {e:?}"));
        assert!(text.contains("numthreads"), "{name}: HLSL entry point");
    }
}
