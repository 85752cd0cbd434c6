//! Floor 4: reverse-mode differentiation on a dynamic tape.
//!
//! A [`Var`] is a tensor value with, where something upstream needs a gradient, the tape node that
//! made it. Nodes are created in execution order, so walking them by falling number is a reverse
//! topological order; each backward closure is dropped right after it ran, and with it the
//! activations that it held.

mod attention;
mod checkpoint;
mod functions;
mod layers;
mod replayed;
mod var;

pub use attention::{attention, attention_captured, attention_tapped};
pub use checkpoint::checkpoint;
pub use layers::swiglu;
pub use replayed::Replayed;
pub use var::{Gradients, Var, enter_layer, find_non_finite, no_grad};
