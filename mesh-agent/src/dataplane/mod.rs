//! The kernel side as the agent sees it.

pub mod sys;
