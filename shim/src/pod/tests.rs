//! The decorator against the real kernel, around a plain service that makes no containers.

mod bench;
mod life;
mod refusals;
