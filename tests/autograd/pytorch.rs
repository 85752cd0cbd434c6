//! Each function's value and gradients against PyTorch in f64 (tests/reference/autograd.py).

use std::collections::BTreeSet;

use lavender_wgpu::autograd::{Var, swiglu};
use lavender_wgpu::ops::conv2d::Conv2dOptions;
use lavender_wgpu::ops::cross_entropy::IGNORE;
use lavender_wgpu::ops::unary::Unary;
use lavender_wgpu::tensor::{Checkpoint, Tensor};
use serde_json::Value;

use crate::support::*;

pub struct Fixture {
    tensors: Checkpoint,
    pub options: Value,
    pub ran: BTreeSet<String>,
}

impl Fixture {
    pub fn open() -> Fixture {
        let dir = reference("autograd");
        let text = std::fs::read_to_string(dir.join("ops.json")).expect("ops.json");
        Fixture {
            tensors: Checkpoint::open(&dir.join("ops.safetensors"), "ops").expect("fixture"),
            options: serde_json::from_str(&text).expect("JSON"),
            ran: BTreeSet::new(),
        }
    }

    fn tensor(&self, name: &str) -> Tensor {
        let shape = self.tensors.shape(name).expect(name).to_vec();
        self.tensors.tensor(gpu(), name, &shape).expect(name)
    }

    fn values(&self, name: &str) -> Vec<f64> {
        let (values, _) = self.tensors.values(name).expect(name);
        values.into_iter().map(f64::from).collect()
    }

    pub fn option(&self, case: &str, name: &str) -> &Value {
        &self.options[case][name]
    }

    /// Runs `f` on the case's inputs, in the order of `names`, and compares output and gradients.
    ///
    /// Each leaf is half the input and doubled on the tape, so that the function stands mid-graph.
    fn run(&mut self, case: &str, names: &[&str], f: impl Fn(&[Var]) -> Var) {
        self.run_all(case, names, |inputs| vec![("out", "w", f(inputs))]);
    }

    /// [`Fixture::run`] with several outputs, each with its name and its weights' in the fixture.
    pub fn run_all(
        &mut self,
        case: &str,
        names: &[&str],
        f: impl Fn(&[Var]) -> Vec<(&'static str, &'static str, Var)>,
    ) {
        let leaves: Vec<Var> = names
            .iter()
            .map(|n| {
                let (values, shape) = self.tensors.values(&format!("{case}.in.{n}")).expect(n);
                let half: Vec<f32> = values.iter().map(|v| v / 2.0).collect();
                Var::parameter(Tensor::from_f32(gpu(), &half, &shape))
            })
            .collect();
        let inputs: Vec<Var> = leaves.iter().map(|leaf| leaf.scale(2.0)).collect();
        let mut losses: Vec<Var> = Vec::new();
        for (name, weights, out) in f(&inputs) {
            let name = format!("{case}.{name}");
            assert_eq!(
                Some(out.shape()),
                self.tensors.shape(&name),
                "{name}: shape"
            );
            assert_close(&name, out.value(), &self.values(&name));
            let weights = Var::constant(self.tensor(&format!("{case}.{weights}")));
            losses.push(out.mul(&weights).sum_all());
        }
        let grads = Var::concat(&losses, 0).sum_all().backward();
        for (name, leaf) in names.iter().zip(&leaves) {
            let expected: Vec<f64> = self
                .values(&format!("{case}.grad.{name}"))
                .iter()
                .map(|g| 2.0 * g)
                .collect();
            let grad = grads
                .get(leaf)
                .unwrap_or_else(|| panic!("{case}: no gradient of {name}"));
            assert_eq!(
                grad.shape(),
                leaf.shape(),
                "{case}: shape of the gradient of {name}"
            );
            assert_close(&format!("{case} gradient of {name}"), grad, &expected);
        }
        self.ran.insert(case.to_string());
    }
}

pub fn usizes(value: &Value) -> Vec<usize> {
    let list = value.as_array().expect("a list");
    list.iter()
        .map(|v| v.as_u64().expect("a size") as usize)
        .collect()
}

#[test]
fn values_and_gradients_match_pytorch() {
    let mut fixture = Fixture::open();
    products(&mut fixture);
    norms_and_losses(&mut fixture);
    elementwise(&mut fixture);
    reductions_and_layout(&mut fixture);
    let all = fixture.options.as_object().expect("an object").keys();
    let left: Vec<_> = all
        .filter(|name| !fixture.ran.contains(*name) && !name.starts_with("attention"))
        .collect();
    assert!(
        left.is_empty(),
        "cases of the fixture that nothing ran: {left:?}"
    );
}

fn products(fixture: &mut Fixture) {
    fixture.run("matmul", &["a", "b"], |v| v[0].matmul(&v[1]));
    fixture.run("matmul_t", &["a", "b"], |v| v[0].matmul_t(&v[1]));
    fixture.run("matmul_batched", &["a", "b"], |v| v[0].matmul(&v[1]));
    fixture.run("matmul_epilogue", &["a", "b", "bias", "residual"], |v| {
        v[0].linear(&v[1], Some(&v[2]))
            .unary(Unary::GeluErf)
            .add(&v[3])
    });
    for case in [
        "conv3x3",
        "conv3x3_stride2",
        "conv3x3_stride2_right",
        "conv1x1",
    ] {
        let padding = usizes(fixture.option(case, "padding_top_left_bottom_right"));
        let options = Conv2dOptions {
            stride: fixture.option(case, "stride").as_u64().expect("stride") as usize,
            // Stored as top, left, bottom, right.
            padding: [padding[0], padding[2], padding[1], padding[3]],
        };
        let names: &[&str] = if case == "conv1x1" {
            &["x", "kernel"]
        } else {
            &["x", "kernel", "b"]
        };
        fixture.run(case, names, |v| v[0].conv2d(&v[1], v.get(2), options));
    }
}

fn norms_and_losses(fixture: &mut Fixture) {
    let affine = ["x", "weight", "bias"];
    fixture.run("layer_norm", &affine, |v| {
        v[0].layer_norm(&v[1], &v[2], 1e-5)
    });
    fixture.run("rms_norm", &affine[..2], |v| v[0].rms_norm(&v[1], 1e-6));
    fixture.run("group_norm", &affine, |v| {
        v[0].group_norm(3, &v[1], &v[2], 1e-5)
    });
    fixture.run("instance_norm", &["x"], |v| v[0].instance_norm(1e-5));
    fixture.run("softmax", &["x"], |v| v[0].softmax());
    let labels: Vec<u32> = fixture
        .option("cross_entropy", "labels")
        .as_array()
        .expect("labels")
        .iter()
        .map(|v| v.as_u64().map_or(IGNORE, |label| label as u32))
        .collect();
    let count = labels.iter().filter(|&&label| label != IGNORE).count();
    let labels = Tensor::from_u32(gpu(), &labels, &[labels.len()]);
    fixture.run("cross_entropy", &["logits"], |v| {
        v[0].cross_entropy(&labels, count)
    });
}

fn elementwise(fixture: &mut Fixture) {
    for (case, function) in [
        ("silu", Unary::Silu),
        ("gelu_tanh", Unary::GeluTanh),
        ("gelu_erf", Unary::GeluErf),
        ("quick_gelu", Unary::QuickGelu),
        ("relu", Unary::Relu),
        ("relu6", Unary::Relu6),
        ("leaky_relu", Unary::LeakyRelu(0.1)),
        ("tanh", Unary::Tanh),
        ("sigmoid", Unary::Sigmoid),
    ] {
        fixture.run(case, &["x"], |v| v[0].unary(function));
    }
    fixture.run("swiglu", &["gate", "up"], |v| swiglu(&v[0], &v[1]));
    fixture.run("add_broadcast", &["a", "b"], |v| v[0].add(&v[1]));
    fixture.run("mul_broadcast", &["a", "b"], |v| v[0].mul(&v[1]));
    fixture.run("div_broadcast", &["a", "b"], |v| v[0].div(&v[1]));
}

fn reductions_and_layout(fixture: &mut Fixture) {
    fixture.run("sum_middle", &["x"], |v| v[0].sum(&[1], false));
    fixture.run("mean_last", &["x"], |v| v[0].mean(&[2], true));
    fixture.run("mean_two", &["x"], |v| v[0].mean(&[0, 2], false));
    fixture.run("max_last", &["x"], |v| v[0].max(&[2], false));
    fixture.run("max_first", &["x"], |v| v[0].max(&[0], false));
    fixture.run("min_last", &["x"], |v| v[0].min(&[2], false));
    fixture.run("min_max", &["x"], |v| {
        let (low, high) = (v[0].min(&[1], true), v[0].max(&[1], true));
        v[0].sub(&low).div(&high.sub(&low).add_scalar(1e-6))
    });
    let (cos, sin) = (fixture.tensor("rotary.cos"), fixture.tensor("rotary.sin"));
    fixture.run("rotary", &["x"], |v| v[0].rotary(&cos, &sin, 3));
    for case in ["resize_up", "resize_down"] {
        let size = usizes(fixture.option(case, "size"));
        fixture.run(case, &["x"], |v| v[0].resize_bilinear(size[0], size[1]));
    }
    fixture.run("upsample_nearest", &["x"], |v| v[0].upsample_nearest2x());
    let ids: Vec<u32> = usizes(fixture.option("embedding", "ids"))
        .iter()
        .map(|&i| i as u32)
        .collect();
    let ids = Tensor::from_u32(gpu(), &ids, &[ids.len()]);
    fixture.run("embedding", &["table"], |v| {
        Var::embedding(&v[0], &ids, v[0].dtype())
    });
    fixture.run("concat", &["a", "b"], |v| Var::concat(v, 1));
    let axes = usizes(fixture.option("permute", "axes"));
    fixture.run("permute", &["x"], |v| v[0].permute(&axes));
}
