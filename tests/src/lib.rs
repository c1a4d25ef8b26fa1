//! End-to-end tests: real programs in network namespaces and cgroups against the real agent and kernel.
