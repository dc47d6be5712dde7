//! CPUs of the pool, claimed with flock()ed files in `<state_dir>/cpu/`; a crash releases them.
