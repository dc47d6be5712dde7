//! The plain task service: containers by an OCI runtime, as the runc v2 shim runs them.
