//! Parts of a model whose dispatches are recorded once for each shape and replayed from then on, forward and backward,
//! as `torch.cuda.make_graphed_callables` does.

use std::cell::RefCell;
use std::rc::Rc;

use super::checkpoint::backward_again;
use super::var::{Earlier, recording, watching};
use super::{Gradients, Var, no_grad};
use crate::gpu::{Arena, Gpu, Hold, Plan};
use crate::tensor::{DType, Place, Tensor};

/// Plans kept of one part; the one longest out of use goes first.
const PLANS: usize = 32;

/// A part of a model with its plans.
///
/// Inputs are copied to the plans' own places and results away from them, so a plan may be replayed as soon as its
/// results are there. Plans share their memory: while a forward waits for its backward, another call is computed op by
/// op.
pub struct Replayed {
    gpu: Gpu,
    arena: RefCell<Arena>,
    /// The one used last at the end.
    parts: RefCell<Vec<(Key, Rc<Part>)>>,
}

/// What has to be the same for a plan to serve.
#[derive(PartialEq)]
struct Key {
    own: Vec<usize>,
    /// Shape, type and whether a gradient is needed.
    inputs: Vec<(Vec<usize>, DType, bool)>,
    taped: bool,
}

/// What is computed.
type Function = Rc<dyn Fn(&[Var]) -> Vec<Var>>;

/// The plans of one key.
struct Part {
    inputs: Vec<Place>,
    outputs: Vec<Place>,
    forward: Plan,
    /// Whether an output needs a gradient.
    tracked: bool,
    /// Inputs and outputs on the tape of the forward that was recorded, until its backward is.
    tape: RefCell<Option<(Vec<Var>, Vec<Var>)>>,
    backward: RefCell<Option<Rc<BackwardPart>>>,
    /// What the plans read.
    _kept: Option<Function>,
}

struct BackwardPart {
    plan: Plan,
    /// Where the outputs' gradients go; `None` for those that had none.
    upstream: Vec<Option<Place>>,
    /// Gradients of the inputs.
    inputs: Vec<Option<Place>>,
    /// Those of the leaves within.
    leaves: Vec<(u64, Place)>,
}

impl Replayed {
    /// No plans yet.
    pub fn new(gpu: &Gpu) -> Self {
        Self {
            gpu: gpu.clone(),
            arena: RefCell::new(Arena::new(gpu)),
            parts: RefCell::default(),
        }
    }

    /// `f(inputs)`, recorded or replayed where the GPU was opened so and no other call waits for its backward.
    ///
    /// `f` must do the same for the same `own` key and the same shapes and dtypes of `inputs`; what else it reads must
    /// keep its place, and live for as long as `f`. Leaves that it holds get their gradients.
    pub fn call(
        &self,
        own: &[usize],
        inputs: &[Var],
        f: impl Fn(&[Var]) -> Vec<Var> + 'static,
    ) -> Vec<Var> {
        let Some(hold) = self.hold() else {
            return f(inputs);
        };
        let f: Function = Rc::new(f);
        let key = Key::new(own, inputs, recording());
        let Some(part) = self.forward(key, inputs, &*f, Some(&f)) else {
            return f(inputs);
        };
        let values = part.outputs.iter().map(Place::copy).collect();
        let call = Call {
            gpu: self.gpu.clone(),
            arena: self.arena.borrow().clone(),
            inputs: inputs.iter().map(|v| v.value().clone()).collect(),
            part: part.clone(),
            f,
            _hold: hold,
        };
        let backward =
            move |upstream: &[Option<Tensor>],
                  needs: &[bool],
                  _: &mut Earlier,
                  outer: &mut Gradients| { call.backward(upstream, needs, outer) };
        match part.tracked {
            true => {
                let parents: Vec<&Var> = inputs.iter().collect();
                Var::from_multi_op("replayed", values, &parents, true, Box::new(backward))
            }
            false => values.into_iter().map(Var::constant).collect(),
        }
    }

    /// [`Replayed::call`] off the tape, where all that `f` reads lives as long as this.
    pub fn call_no_grad(
        &self,
        own: &[usize],
        inputs: &[Var],
        f: impl Fn(&[Var]) -> Vec<Var>,
    ) -> Vec<Var> {
        no_grad(|| {
            // Until the results are copied.
            let Some(_hold) = self.hold() else {
                return f(inputs);
            };
            match self.forward(Key::new(own, inputs, false), inputs, &f, None) {
                Some(part) => {
                    let values = part.outputs.iter().map(Place::copy);
                    values.map(Var::constant).collect()
                }
                None => f(inputs),
            }
        })
    }

    /// Drops all plans; their memory is there for other things at once.
    pub fn forget(&self) {
        self.parts.borrow_mut().clear();
        self.arena.replace(Arena::new(&self.gpu));
    }

    /// Holds the arena for a call; `None` where the call is to be computed op by op.
    fn hold(&self) -> Option<Hold> {
        let mut arena = self.arena.borrow_mut();
        if !self.gpu.replays() || self.gpu.planning() || watching() || arena.held() {
            return None;
        }
        if arena.given_up() {
            self.parts.borrow_mut().clear();
            *arena = Arena::new(&self.gpu);
        }
        Some(arena.hold())
    }

    /// Replays the plan of `key` on `inputs`, or makes it, which keeps `kept` alive. `None` after a fault.
    fn forward(
        &self,
        key: Key,
        inputs: &[Var],
        f: &dyn Fn(&[Var]) -> Vec<Var>,
        kept: Option<&Function>,
    ) -> Option<Rc<Part>> {
        let mut parts = self.parts.borrow_mut();
        let part = match parts.iter().position(|(known, _)| *known == key) {
            Some(at) => {
                parts[at..].rotate_left(1);
                let (_, part) = parts.last()?;
                part.fill(inputs);
                self.gpu.replay(&part.forward);
                part.clone()
            }
            None => {
                let part = Rc::new(self.record(key.taped, inputs, f, kept)?);
                if parts.len() == PLANS {
                    parts.remove(0);
                }
                parts.push((key, part.clone()));
                part
            }
        };
        Some(part)
    }

    fn record(
        &self,
        taped: bool,
        inputs: &[Var],
        f: &dyn Fn(&[Var]) -> Vec<Var>,
        kept: Option<&Function>,
    ) -> Option<Part> {
        let arena = self.arena.borrow();
        let own: Vec<Var> = inputs
            .iter()
            .map(|input| {
                let own = within(&self.gpu, &arena, input.value());
                match taped && input.needs_grad() {
                    true => Var::parameter(own),
                    false => Var::constant(own),
                }
            })
            .collect();
        let (outputs, forward) = self.gpu.plan(&arena, || f(&own));
        let place = |v: &Var| v.value().place();
        let tracked = outputs.iter().any(Var::needs_grad);
        Some(Part {
            inputs: own.iter().map(place).collect(),
            outputs: outputs.iter().map(place).collect(),
            forward: forward?,
            tracked,
            tape: RefCell::new(tracked.then_some((own, outputs))),
            backward: RefCell::default(),
            _kept: kept.cloned(),
        })
    }
}

/// A copy of `tensor` in `arena`.
fn within(gpu: &Gpu, arena: &Arena, tensor: &Tensor) -> Tensor {
    let allocate = || Tensor::empty(gpu, tensor.dtype(), tensor.shape());
    let (copy, _) = gpu.plan(arena, allocate);
    copy.copy_from(tensor);
    copy
}

impl Key {
    fn new(own: &[usize], inputs: &[Var], taped: bool) -> Key {
        let input = |v: &Var| (v.shape().to_vec(), v.dtype(), taped && v.needs_grad());
        Key {
            own: own.to_vec(),
            inputs: inputs.iter().map(input).collect(),
            taped,
        }
    }
}

impl Part {
    fn fill(&self, inputs: &[Var]) {
        for (place, input) in self.inputs.iter().zip(inputs) {
            place.fill(input.value());
        }
    }
}

/// A call whose backward is to come.
struct Call {
    gpu: Gpu,
    arena: Arena,
    inputs: Vec<Tensor>,
    part: Rc<Part>,
    f: Function,
    /// Keeps what the forward left for the backward.
    _hold: Hold,
}

impl Call {
    /// Gradients of the inputs; those of leaves go to `outer`.
    fn backward(
        self,
        upstream: &[Option<Tensor>],
        needs: &[bool],
        outer: &mut Gradients,
    ) -> Vec<Option<Tensor>> {
        let known = self.part.backward.borrow().clone();
        let tape = self.part.tape.take();
        let part = match (known, tape) {
            (Some(part), _) if part.takes(upstream) => {
                part.fill(upstream);
                self.gpu.replay(&part.plan);
                part
            }
            (None, Some(tape)) => match self.record(tape, upstream) {
                Some(part) => Rc::new(part),
                None => return vec![None; needs.len()],
            },
            // Gradients that the plan does not know.
            _ => return backward_again(&*self.f, &self.inputs, upstream, needs, outer),
        };
        self.part.backward.replace(Some(part.clone()));
        for (id, place) in &part.leaves {
            outer.add(*id, place.copy());
        }
        let copy = |place: &Option<Place>| place.as_ref().map(Place::copy);
        part.inputs.iter().map(copy).collect()
    }

    fn record(
        &self,
        (inputs, outputs): (Vec<Var>, Vec<Var>),
        upstream: &[Option<Tensor>],
    ) -> Option<BackwardPart> {
        let own = |grad: &Tensor| within(&self.gpu, &self.arena, grad);
        let own: Vec<Option<Tensor>> = upstream.iter().map(|g| g.as_ref().map(own)).collect();
        let place = |t: &Tensor| t.place();
        let places = own.iter().map(|g| g.as_ref().map(place)).collect();
        let roots = outputs.into_iter().zip(own);
        let roots: Vec<(Var, Tensor)> = roots.filter_map(|(v, g)| Some((v, g?))).collect();
        let (mut gradients, plan) = self.gpu.plan(&self.arena, || Var::backward_with(&roots));
        let mut taken = |input: &Var| gradients.take(input).map(|t| t.place());
        Some(BackwardPart {
            upstream: places,
            inputs: inputs.iter().map(&mut taken).collect(),
            leaves: gradients
                .into_leaves()
                .map(|(id, t)| (id, t.place()))
                .collect(),
            plan: plan?,
        })
    }
}

impl BackwardPart {
    /// Whether it has a place for each of the gradients.
    fn takes(&self, upstream: &[Option<Tensor>]) -> bool {
        let mut both = self.upstream.iter().zip(upstream);
        both.all(|(place, grad)| place.is_some() || grad.is_none())
    }

    /// Puts the gradients there, zeros where there is none.
    fn fill(&self, upstream: &[Option<Tensor>]) {
        for (place, grad) in self.upstream.iter().zip(upstream) {
            match (place, grad) {
                (Some(place), Some(grad)) => place.fill(grad),
                (Some(place), None) => place.clear(),
                (None, _) => {}
            }
        }
    }
}
