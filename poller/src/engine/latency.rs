//! Keeps CPUs from deep sleep while a pod asks for it: `/dev/cpu_dma_latency`, whose value holds while the file is open
//! (Documentation/power/pm_qos_interface.rst).

use std::fs::{File, OpenOptions};
use std::io::Write;

use kbp_kernel::Micros;

const DEVICE: &str = "/dev/cpu_dma_latency";

/// The request of this process; none at first.
#[derive(Debug, Default)]
pub(crate) struct Latency {
    held: Option<(Micros, File)>,
}

impl Latency {
    /// What is held.
    pub(super) fn micros(&self) -> Option<Micros> {
        self.held.as_ref().map(|(micros, _)| *micros)
    }

    /// Holds `asked` from now on, or nothing. It was tried by [`Latency::probe`] when it was asked for, so a failure is only logged.
    pub(super) fn hold(&mut self, asked: Option<Micros>) {
        if self.micros() == asked {
            return;
        }
        // The new one first, so that there is no gap.
        self.held = asked.and_then(|micros| match request(micros) {
            Ok(file) => Some((micros, file)),
            Err(reason) => {
                tracing::warn!("{reason}");
                None
            }
        });
    }

    /// Why `asked` could not be held, if so.
    pub(crate) fn probe(asked: Micros) -> Option<String> {
        request(asked).err()
    }
}

fn request(micros: Micros) -> Result<File, String> {
    let value = i32::try_from(micros.0).unwrap_or(i32::MAX);
    let opened = OpenOptions::new().write(true).open(DEVICE);
    opened
        .and_then(|mut file| file.write_all(&value.to_ne_bytes()).map(|()| file))
        .map_err(|e| {
            format!(
                "{DEVICE} could not be set to {micros} µs: {e}; it takes root, and the device in the unit's DeviceAllow"
            )
        })
}
