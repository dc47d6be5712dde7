//! What an init system is told (sd_notify(3)): one datagram a state.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// Speaks to the init system, where there is one that listens.
#[derive(Debug)]
pub(super) struct Notifier {
    socket: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// What `NOTIFY_SOCKET` and `WATCHDOG_USEC` say.
    pub(super) fn from_environment() -> Self {
        let address = std::env::var("NOTIFY_SOCKET").unwrap_or_default();
        let usec = std::env::var("WATCHDOG_USEC").unwrap_or_default();
        let pid = std::env::var("WATCHDOG_PID").unwrap_or_default();
        let is_ours = pid.is_empty() || pid == std::process::id().to_string();
        Self::new(&address, if is_ours { &usec } else { "" })
    }

    fn new(address: &str, usec: &str) -> Self {
        let peer = match address.split_at_checked(1) {
            Some(("@", name)) => SocketAddr::from_abstract_name(name).ok(),
            Some(("/", _)) => SocketAddr::from_pathname(address).ok(),
            _ => None,
        };
        Self {
            socket: peer.and_then(|peer| Some((UnixDatagram::unbound().ok()?, peer))),
            // systemd's own advice: twice in the time.
            watchdog: usec
                .parse()
                .ok()
                .filter(|usec| *usec > 0)
                .map(|usec: u64| Duration::from_micros(usec / 2)),
        }
    }

    /// How often [`Notifier::watchdog`] is to be called.
    pub(super) fn interval(&self) -> Option<Duration> {
        self.socket.as_ref().and(self.watchdog)
    }

    pub(super) fn ready(&self) {
        self.send("READY=1\n");
    }

    pub(super) fn stopping(&self) {
        self.send("STOPPING=1\n");
    }

    pub(super) fn watchdog(&self) {
        self.send("WATCHDOG=1\n");
    }

    fn send(&self, state: &str) {
        if let Some((socket, peer)) = &self.socket
            && let Err(error) = socket.send_to_addr(state.as_bytes(), peer)
        {
            tracing::warn!(%error, "the init system could not be told {}", state.trim());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_arrive_by_path_and_by_abstract_name() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("notify");
        let by_path = UnixDatagram::bind(&path).expect("bind");
        let name = format!("kbp-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("name");
        let by_name = UnixDatagram::bind_addr(&address).expect("bind");
        for (receiver, address) in [
            (by_path, path.display().to_string()),
            (by_name, format!("@{name}")),
        ] {
            let notifier = Notifier::new(&address, "3000000");
            assert_eq!(notifier.interval(), Some(Duration::from_millis(1500)));
            for (tell, expected) in [
                (Notifier::ready as fn(&Notifier), "READY=1\n"),
                (Notifier::watchdog, "WATCHDOG=1\n"),
                (Notifier::stopping, "STOPPING=1\n"),
            ] {
                tell(&notifier);
                let mut text = [0; 64];
                let length = receiver.recv(&mut text).expect("a datagram");
                assert_eq!(&text[..length], expected.as_bytes());
            }
        }
    }

    #[test]
    fn without_an_init_system_nothing_is_told() {
        for (address, usec) in [("", "1000000"), ("relative", "1000000"), ("@x", "")] {
            let notifier = Notifier::new(address, usec);
            assert_eq!(notifier.interval(), None);
            notifier.ready();
        }
    }
}
