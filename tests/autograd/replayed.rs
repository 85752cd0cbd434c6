//! Recorded and replayed parts against the same parts op by op: the same bits.

use std::cell::Cell;
use std::rc::Rc;

use lavender_wgpu::autograd::{Replayed, Var, find_non_finite, no_grad};
use lavender_wgpu::gpu::{Gpu, GpuOptions, Replay};
use lavender_wgpu::tensor::Tensor;

use crate::support::{rng, uniform};

fn open(replay: Replay) -> Gpu {
    let options = GpuOptions {
        replay,
        checked: true,
        ..GpuOptions::default()
    };
    Gpu::new(&options).expect("adapter")
}

/// Two layers with a second output in their middle, and how often they were computed op by op.
struct Model {
    gpu: Gpu,
    weights: [Var; 2],
    plans: Replayed,
    computed: Rc<Cell<usize>>,
}

/// What a call came to: outputs, and gradients of the input and both weights.
type Outcome = (Vec<Vec<f32>>, Vec<Option<Vec<f32>>>);

impl Model {
    fn new(replay: Replay) -> Model {
        let gpu = open(replay);
        let mut rng = rng(7);
        let weights = [[12, 20], [8, 12]].map(|shape: [usize; 2]| {
            let values = uniform(&mut rng, shape[0] * shape[1]);
            Var::parameter(Tensor::from_f32(&gpu, &values, &shape))
        });
        Model {
            plans: Replayed::new(&gpu),
            weights,
            computed: Rc::default(),
            gpu,
        }
    }

    fn call(&self, x: &Var) -> Vec<Var> {
        let ([a, b], computed) = (self.weights.clone(), self.computed.clone());
        self.plans.call(&[], std::slice::from_ref(x), move |x| {
            computed.set(computed.get() + 1);
            let middle = x[0].linear(&a, None).silu();
            vec![middle.linear(&b, None), middle.square()]
        })
    }

    fn input(&self, rows: usize, seed: u64) -> Var {
        let values = uniform(&mut rng(seed), rows * 20);
        Var::parameter(Tensor::from_f32(&self.gpu, &values, &[rows, 20]))
    }

    /// One call, `roots` of whose outputs have a gradient.
    fn outcome(&self, rows: usize, seed: u64, roots: [bool; 2]) -> Outcome {
        let x = self.input(rows, seed);
        let outputs = self.call(&x);
        let upstream: Vec<(Var, Tensor)> = outputs
            .iter()
            .zip(roots)
            .filter(|(_, root)| *root)
            .map(|(y, _)| {
                let values = uniform(&mut rng(seed + 100), y.value().elements());
                (y.clone(), Tensor::from_f32(&self.gpu, &values, y.shape()))
            })
            .collect();
        let gradients = Var::backward_with(&upstream);
        let read = |t: &Tensor| t.to_f32().expect("readable");
        let leaves = [&x, &self.weights[0], &self.weights[1]];
        let of_leaf = |leaf: &Var| gradients.get(leaf).map(read);
        (
            outputs.iter().map(|y| read(y.value())).collect(),
            leaves.map(of_leaf).to_vec(),
        )
    }
}

#[test]
fn values_and_gradients_are_those_of_the_ops_themselves() {
    let (plain, replayed) = (Model::new(Replay::Off), Model::new(Replay::On));
    // Two shapes in turns; all gradients, then those of one output alone.
    for (seed, rows) in [16, 16, 5, 16, 5, 16].into_iter().enumerate() {
        let roots = [true, seed != 3];
        let expected = plain.outcome(rows, seed as u64, roots);
        assert_eq!(
            replayed.outcome(rows, seed as u64, roots),
            expected,
            "{seed}"
        );
    }
    assert_eq!((plain.computed.get(), replayed.computed.get()), (6, 2));
}

#[test]
fn gradients_that_a_plan_does_not_know_are_computed_anew() {
    let (plain, replayed) = (Model::new(Replay::Off), Model::new(Replay::On));
    for (seed, roots) in [(0, [true, false]), (1, [true, true]), (2, [true, false])] {
        let expected = plain.outcome(9, seed, roots);
        assert_eq!(replayed.outcome(9, seed, roots), expected, "{seed}");
    }
    // Recorded once, and once more for the second step's backward.
    assert_eq!(replayed.computed.get(), 2);
}

#[test]
fn a_call_while_another_waits_for_its_backward_leaves_it_alone() {
    let (plain, replayed) = (Model::new(Replay::Off), Model::new(Replay::On));
    replayed.outcome(6, 1, [true, true]);
    let gradient = |model: &Model| {
        let (x, other) = (model.input(6, 2), model.input(6, 3));
        let (y, z) = (model.call(&x), model.call(&other));
        let loss = y[0].sum_all().add(&z[1].sum_all());
        let gradients = loss.backward();
        let leaves = [&x, &other, &model.weights[0]];
        leaves.map(|leaf| gradients.get(leaf).expect("one").to_f32().unwrap())
    };
    assert_eq!(gradient(&replayed), gradient(&plain));
    // A forward whose backward never comes does not stay in the way.
    drop(replayed.call(&replayed.input(6, 4)));
    let computed = replayed.computed.get();
    replayed.outcome(6, 5, [true, true]);
    assert_eq!(replayed.computed.get(), computed);
}

#[test]
fn a_pass_without_a_tape_is_replayed_too() {
    let (plain, replayed) = (Model::new(Replay::Off), Model::new(Replay::On));
    for seed in 0..3 {
        let [a, b] = [&plain, &replayed].map(|model| {
            let y = no_grad(|| model.call(&model.input(7, seed)));
            assert!(!y[0].needs_grad());
            y[0].value().to_f32().unwrap()
        });
        assert_eq!(a, b);
    }
    assert_eq!(replayed.computed.get(), 1);
}

#[test]
fn a_search_for_the_first_bad_result_sees_every_op() {
    let model = Model::new(Replay::On);
    model.outcome(4, 1, [true, true]);
    let bad = Tensor::from_f32(&model.gpu, &[f32::NAN; 80], &[4, 20]);
    let found = find_non_finite(|| drop(model.call(&Var::constant(bad))));
    assert!(found.is_some_and(|op| op.starts_with("linear")));
}
