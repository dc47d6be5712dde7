//! CPU topology: which CPUs exist, are online, isolated, siblings.

use std::path::Path;

use crate::{CpuId, CpuSet, Result};

/// What the machine says about its CPUs, read once from a sysfs root (`/sys`, or a tree made by a test).
#[derive(Debug, Clone)]
pub struct Topology {
    /// CPUs that are online.
    pub online: CpuSet,
    /// CPUs that the scheduler's balancing leaves alone (`isolcpus=`, `/sys/devices/system/cpu/isolated`).
    pub isolated: CpuSet,
    /// CPUs without a periodic tick (`nohz_full=`).
    pub nohz_full: CpuSet,
}

impl Topology {
    /// Reads the machine's topology below `/sys`.
    pub fn read() -> Result<Self> { Self::read_from(Path::new("/sys")) }
    /// Reads a topology below another root.
    pub fn read_from(_sys: &Path) -> Result<Self> { todo!() }
    /// SMT siblings of `cpu`, itself included.
    pub fn siblings(&self, _cpu: CpuId) -> Result<CpuSet> { todo!() }
    /// NUMA node of `cpu`; 0 where there is none.
    pub fn numa_node(&self, _cpu: CpuId) -> Result<u32> { todo!() }
}
