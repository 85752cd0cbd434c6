//! `Var`, the tape and the backward walk.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use crate::error::Result;
use crate::ops::binary::{Binary, binary};
use crate::tensor::{DType, Tensor};

/// Upstream gradients (one per output, `None` where nothing depends on it) and which parents need
/// one; returns one gradient per parent. Gradients of leaves met inside go to the last argument.
type Backward = Box<
    dyn FnOnce(&[Option<Tensor>], &[bool], &mut Earlier, &mut Gradients) -> Vec<Option<Tensor>>,
>;

/// The gradients that an op's parents have from other ops by the time its backward runs. A backward that takes one out
/// returns its own gradient with that added, for which it needs no kernel of its own.
pub(super) type Earlier = [Option<Tensor>];

/// A parent node with the index of the output used; `None` for a constant.
type Parent = Option<(Rc<Node>, usize)>;

struct Node {
    id: u64,
    op: &'static str,
    /// Parent nodes with the index of the output used; `None` for constants.
    parents: RefCell<Vec<Parent>>,
    outputs: usize,
    backward: RefCell<Option<Backward>>,
}

impl Drop for Node {
    // A long tape would otherwise recurse once per node.
    fn drop(&mut self) {
        let mut pending = std::mem::take(self.parents.get_mut());
        while let Some(parent) = pending.pop() {
            if let Some(mut node) = parent.and_then(|(node, _)| Rc::into_inner(node)) {
                pending.append(node.parents.get_mut());
            }
        }
    }
}

thread_local! {
    static NEXT_ID: Cell<u64> = const { Cell::new(0) };
    static RECORDING: Cell<bool> = const { Cell::new(true) };
    /// Set while looking for the first op with a non-finite result.
    static WATCH: RefCell<Option<Watch>> = const { RefCell::new(None) };
}

/// A search for the first result that is not finite.
#[derive(Default)]
struct Watch {
    /// The layer that was entered last.
    layer: Option<String>,
    found: Option<String>,
}

fn next_id() -> u64 {
    NEXT_ID.replace(NEXT_ID.get() + 1)
}

/// Runs `f` without recording a tape.
pub fn no_grad<T>(f: impl FnOnce() -> T) -> T {
    with_recording(false, f)
}

pub(super) fn with_recording<T>(on: bool, f: impl FnOnce() -> T) -> T {
    let before = RECORDING.replace(on);
    let result = f();
    RECORDING.set(before);
    result
}

pub(super) fn recording() -> bool {
    RECORDING.get()
}

/// Runs `f` and names the first op, forward or backward, whose result holds a NaN or an infinity,
/// with its shape and, in a forward, the layer that was entered last.
///
/// Reads every intermediate result back: for finding the cause of a bad loss, not for training.
pub fn find_non_finite(f: impl FnOnce()) -> Option<String> {
    WATCH.set(Some(Watch::default()));
    f();
    WATCH.take().and_then(|watch| watch.found)
}

/// Whether a search by [`find_non_finite`] is on, which has to see every op.
pub(super) fn watching() -> bool {
    WATCH.with_borrow(Option::is_some)
}

/// Tells a search by [`find_non_finite`], if one is on, which layer runs from here on: its name in the checkpoint.
pub fn enter_layer(name: &str) {
    WATCH.with_borrow_mut(|watch| {
        if let Some(Watch { layer, found: None }) = watch {
            *layer = Some(name.to_string());
        }
    });
}

fn watch(what: &str, op: &str, values: &[&Tensor]) {
    WATCH.with_borrow_mut(|watch| {
        let Some(Watch { layer, found }) = watch else {
            return;
        };
        let bad = |value: &&&Tensor| {
            let values = value.to_f32();
            !values.is_ok_and(|v| v.iter().all(|x| x.is_finite()))
        };
        if found.is_none()
            && let Some(value) = values.iter().find(bad)
        {
            // A backward runs after the whole forward: its last layer says nothing.
            let layer = layer.as_ref().filter(|_| what.is_empty());
            let at = layer.map(|l| format!(" at `{l}`")).unwrap_or_default();
            *found = Some(format!("{what}{op} (result {:?}){at}", value.shape()));
        }
    });
}

/// A tensor value, with its place on the tape where a gradient is needed.
#[derive(Clone)]
pub struct Var {
    value: Tensor,
    node: Option<(Rc<Node>, usize)>,
}

impl std::fmt::Debug for Var {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let op = self.node.as_ref().map_or("constant", |(node, _)| node.op);
        write!(f, "Var({op}, {:?})", self.value)
    }
}

impl Var {
    /// A value that needs no gradient.
    pub fn constant(value: Tensor) -> Var {
        Var { value, node: None }
    }

    /// A leaf whose gradient is wanted; optimizers update its tensor in place.
    pub fn parameter(value: Tensor) -> Var {
        let node = Node {
            id: next_id(),
            op: "parameter",
            parents: RefCell::default(),
            outputs: 1,
            backward: RefCell::new(None),
        };
        Var {
            value,
            node: Some((Rc::new(node), 0)),
        }
    }

    /// The tensor.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        self.value.shape()
    }

    /// Size of dimension `i`.
    pub fn dim(&self, i: usize) -> usize {
        self.value.dim(i)
    }

    /// Whether a gradient flows to it.
    pub fn needs_grad(&self) -> bool {
        self.node.is_some()
    }

    /// The same value, cut off from the tape.
    pub fn detach(&self) -> Var {
        Var::constant(self.value.clone())
    }

    /// Records an op with one output. `backward(dy, needs)` returns a gradient per parent; parents
    /// whose `needs` is false may get `None`.
    pub fn from_op(
        op: &'static str,
        value: Tensor,
        parents: &[&Var],
        backward: impl FnOnce(&Tensor, &[bool]) -> Vec<Option<Tensor>> + 'static,
    ) -> Var {
        Var::from_accumulating_op(op, value, parents, move |dy, needs, _| backward(dy, needs))
    }

    /// [`Var::from_op`] whose backward may add to gradients that are there already.
    pub(super) fn from_accumulating_op(
        op: &'static str,
        value: Tensor,
        parents: &[&Var],
        backward: impl FnOnce(&Tensor, &[bool], &mut Earlier) -> Vec<Option<Tensor>> + 'static,
    ) -> Var {
        watch("", op, &[&value]);
        if !recording() || parents.iter().all(|p| p.node.is_none()) {
            return Var::constant(value);
        }
        let run: Backward = Box::new(move |grads, needs, earlier, _| match &grads[0] {
            Some(dy) => backward(dy, needs, earlier),
            None => vec![None; needs.len()],
        });
        let node = Var::node(op, 1, parents, run);
        Var {
            value,
            node: Some((node, 0)),
        }
    }

    /// Records an op with several outputs, as [`Var::from_op`]; `always` keeps it on the tape even
    /// where no parent needs a gradient (leaves inside, as checkpointing has).
    pub(super) fn from_multi_op(
        op: &'static str,
        values: Vec<Tensor>,
        parents: &[&Var],
        always: bool,
        backward: Backward,
    ) -> Vec<Var> {
        watch("", op, &values.iter().collect::<Vec<_>>());
        let tracked = recording() && (always || parents.iter().any(|p| p.node.is_some()));
        if !tracked {
            return values.into_iter().map(Var::constant).collect();
        }
        let node = Var::node(op, values.len(), parents, backward);
        let place = |(i, value)| Var {
            value,
            node: Some((node.clone(), i)),
        };
        values.into_iter().enumerate().map(place).collect()
    }

    fn node(op: &'static str, outputs: usize, parents: &[&Var], backward: Backward) -> Rc<Node> {
        Rc::new(Node {
            id: next_id(),
            op,
            parents: RefCell::new(parents.iter().map(|p| p.node.clone()).collect()),
            outputs,
            backward: RefCell::new(Some(backward)),
        })
    }

    fn id(&self) -> Option<u64> {
        self.node.as_ref().map(|(node, _)| node.id)
    }

    /// Gradients of this scalar with respect to every leaf it depends on.
    ///
    /// Panics when it is no scalar.
    pub fn backward(&self) -> Gradients {
        assert_eq!(self.value.elements(), 1, "backward of {self:?}");
        let one = Tensor::from_bytes(
            self.value.gpu(),
            &self.value.dtype().narrow(&[1.0]),
            self.value.dtype(),
            self.shape(),
        );
        Var::backward_with(&[(self.clone(), one)])
    }

    /// Gradients of Σ ⟨root, upstream⟩ with respect to every leaf; each tape is consumed.
    pub fn backward_with(roots: &[(Var, Tensor)]) -> Gradients {
        let mut gradients = Gradients::default();
        backward_into(roots, &mut gradients);
        gradients
    }
}

pub(super) fn backward_into(roots: &[(Var, Tensor)], gradients: &mut Gradients) {
    let mut pending: BTreeMap<u64, (Rc<Node>, Vec<Option<Tensor>>)> = BTreeMap::new();
    for (root, upstream) in roots {
        if let Some((node, output)) = &root.node {
            accumulate(&mut pending, node, *output, upstream.clone());
        }
    }
    while let Some((id, (node, upstream))) = pending.pop_last() {
        let Some(run) = node.backward.borrow_mut().take() else {
            // A leaf, or a node whose tape an earlier backward has consumed.
            assert_eq!(
                node.op, "parameter",
                "backward ran twice through `{}`",
                node.op
            );
            for grad in upstream.into_iter().flatten() {
                gradients.add(id, grad);
            }
            continue;
        };
        let parents = std::mem::take(&mut *node.parents.borrow_mut());
        let needs: Vec<bool> = parents.iter().map(Option::is_some).collect();
        let mut earlier: Vec<Option<Tensor>> = parents
            .iter()
            .map(|parent| {
                let (node, output) = parent.as_ref()?;
                pending.get_mut(&node.id)?.1[*output].take()
            })
            .collect();
        let grads = run(&upstream, &needs, &mut earlier, gradients);
        drop(upstream);
        watch(
            "the backward of ",
            node.op,
            &grads.iter().flatten().collect::<Vec<_>>(),
        );
        assert_eq!(grads.len(), parents.len(), "backward of `{}`", node.op);
        for grads in [earlier, grads] {
            for (parent, grad) in parents.iter().zip(grads) {
                if let (Some((parent, output)), Some(grad)) = (parent, grad) {
                    accumulate(&mut pending, parent, *output, grad);
                }
            }
        }
    }
}

fn accumulate(
    pending: &mut BTreeMap<u64, (Rc<Node>, Vec<Option<Tensor>>)>,
    node: &Rc<Node>,
    output: usize,
    grad: Tensor,
) {
    let (_, slots) = pending
        .entry(node.id)
        .or_insert_with(|| (node.clone(), vec![None; node.outputs]));
    slots[output] = Some(match slots[output].take() {
        Some(earlier) => binary(&earlier, &grad, Binary::Add),
        None => grad,
    });
}

/// Gradients of leaves, found by the leaf.
#[derive(Default)]
pub struct Gradients(BTreeMap<u64, Tensor>);

impl Gradients {
    /// The gradient of `leaf`, if the loss depends on it.
    pub fn get(&self, leaf: &Var) -> Option<&Tensor> {
        self.0.get(&leaf.id()?)
    }

    /// Takes the gradient of `leaf` out.
    pub fn take(&mut self, leaf: &Var) -> Option<Tensor> {
        self.0.remove(&leaf.id()?)
    }

    /// Adds another set (gradient accumulation over micro-batches).
    pub fn merge(&mut self, other: Gradients) {
        for (id, grad) in other.0 {
            self.add(id, grad);
        }
    }

    /// All of them, by leaf.
    pub(super) fn into_leaves(self) -> impl Iterator<Item = (u64, Tensor)> {
        self.0.into_iter()
    }

    pub(super) fn add(&mut self, id: u64, grad: Tensor) {
        let sum = match self.0.remove(&id) {
            Some(earlier) => binary(&earlier, &grad, Binary::Add),
            None => grad,
        };
        self.0.insert(id, sum);
    }
}

impl Var {
    /// The value of a scalar; waits for the device.
    ///
    /// # Errors
    /// Any GPU error reported by then.
    pub fn scalar(&self) -> Result<f32> {
        Ok(self.value.to_f32()?[0])
    }

    /// Element type of the value.
    pub fn dtype(&self) -> DType {
        self.value.dtype()
    }
}
