//! NAPI instances through the netdev generic netlink family (Documentation/netlink/specs/netdev.yaml).

use crate::netlink::attributes::{attributes, u32_at, u32_attribute, u64_at, u64_attribute};
use crate::netlink::{GENERIC_HEADER, GenericMessage, Request, Socket, open_family};
use crate::netns::Netns;
use crate::{Error, IfIndex, NapiId, Result};

// linux/netdev.h
const NETDEV_CMD_NAPI_GET: u8 = 11;
const NETDEV_CMD_NAPI_SET: u8 = 14;
const NETDEV_A_NAPI_IFINDEX: u16 = 1;
const NETDEV_A_NAPI_ID: u16 = 2;
const NETDEV_A_NAPI_PID: u16 = 4;
const NETDEV_A_NAPI_DEFER_HARD_IRQS: u16 = 5;
const NETDEV_A_NAPI_GRO_FLUSH_TIMEOUT: u16 = 6;
const NETDEV_A_NAPI_IRQ_SUSPEND_TIMEOUT: u16 = 7;
const NETDEV_A_NAPI_THREADED: u16 = 8;

const NAPI_GET: &str = "netdev napi-get";
const NAPI_SET: &str = "netdev napi-set";
const THREADED: &str = "netdev napi-set threaded";
const BUSY_POLL: &str = "netdev napi-set threaded=busy-poll";

/// How the kernel runs a NAPI instance (`napi-set threaded`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threaded {
    /// In softirq.
    Disabled,
    /// In a kernel thread that sleeps between packets.
    Enabled,
    /// In a kernel thread that busy-polls (6.19+).
    BusyPoll,
}

impl Threaded {
    fn to_kernel(self) -> u32 {
        match self {
            Self::Disabled => 0,
            Self::Enabled => 1,
            Self::BusyPoll => 2,
        }
    }

    fn from_kernel(value: u32) -> Option<Self> {
        [Self::Disabled, Self::Enabled, Self::BusyPoll]
            .into_iter()
            .find(|t| t.to_kernel() == value)
    }
}

/// One NAPI instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Napi {
    /// Its id.
    pub id: NapiId,
    /// Its interface.
    pub ifindex: IfIndex,
    /// Thread that runs it, where there is one.
    pub pid: Option<u32>,
    /// How it runs; None where the kernel does not tell.
    pub threaded: Option<Threaded>,
    /// `gro-flush-timeout` in nanoseconds.
    pub gro_flush_timeout: Option<u64>,
    /// `defer-hard-irqs`: empty polls before interrupts are enabled again.
    pub defer_hard_irqs: Option<u32>,
    /// `irq-suspend-timeout` in nanoseconds.
    pub irq_suspend_timeout: Option<u64>,
}

/// What `napi-set` can change; None leaves a value as it is.
#[derive(Debug, Clone, Copy, Default)]
pub struct NapiSettings {
    /// See [`Napi::threaded`].
    pub threaded: Option<Threaded>,
    /// See [`Napi::gro_flush_timeout`].
    pub gro_flush_timeout: Option<u64>,
    /// See [`Napi::defer_hard_irqs`]; at most `i32::MAX`.
    pub defer_hard_irqs: Option<u32>,
    /// See [`Napi::irq_suspend_timeout`].
    pub irq_suspend_timeout: Option<u64>,
}

/// A socket of the `netdev` family inside one network namespace. It sees the instances of that
/// namespace's links only.
#[derive(Debug)]
pub struct NetdevSocket {
    socket: Socket,
    family: u16,
}

impl NetdevSocket {
    /// Opens one in the calling thread's namespace.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the kernel has no netdev family (before 6.3).
    pub fn open() -> Result<Self> {
        let (socket, family) = open_family("netdev", NAPI_GET)?;
        Ok(Self { socket, family })
    }

    /// Opens one in `netns`.
    ///
    /// # Errors
    /// As [`NetdevSocket::open`], and [`Error::Syscall`] when the namespace cannot be entered.
    pub fn open_in(netns: &Netns) -> Result<Self> {
        netns.run(Self::open)?
    }

    /// The NAPI instances of a link. A veth end that is down or has GRO off has none.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such link, [`Error::Unsupported`] when the kernel does
    /// not list instances (before 6.8).
    pub fn napis(&mut self, link: IfIndex) -> Result<Vec<Napi>> {
        let message = GenericMessage {
            family: self.family,
            command: NETDEV_CMD_NAPI_GET,
            attributes: vec![u32_attribute(NETDEV_A_NAPI_IFINDEX, link.0)],
        };
        let what = format!("list NAPI instances of link {link}");
        let family = self.family;
        let found = self
            .socket
            .dump(Request::new(what.clone(), &message), |kind, payload| {
                if kind != family {
                    return Ok(None);
                }
                let napi = payload.get(GENERIC_HEADER..).and_then(read_napi);
                napi.map(Some).ok_or_else(|| Error::Protocol {
                    what: what.clone(),
                    detail: "an instance has no id or no link".to_owned(),
                })
            });
        found.map_err(|error| match error.errno() {
            Some(libc::EOPNOTSUPP) => unsupported(NAPI_GET, &error),
            _ => error.of_link(link),
        })
    }

    /// Changes a NAPI instance of this namespace. Its settings are gone as soon as the link goes
    /// down or its GRO is switched.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such instance here, [`Error::Unsupported`] when the
    /// kernel does not know `napi-set` (before 6.13) or [`Threaded::BusyPoll`] (before 6.19).
    pub fn set(&mut self, id: NapiId, settings: NapiSettings) -> Result<()> {
        let values = [
            settings
                .threaded
                .map(|t| u32_attribute(NETDEV_A_NAPI_THREADED, t.to_kernel())),
            settings
                .gro_flush_timeout
                .map(|v| u64_attribute(NETDEV_A_NAPI_GRO_FLUSH_TIMEOUT, v)),
            settings
                .defer_hard_irqs
                .map(|v| u32_attribute(NETDEV_A_NAPI_DEFER_HARD_IRQS, v)),
            settings
                .irq_suspend_timeout
                .map(|v| u64_attribute(NETDEV_A_NAPI_IRQ_SUSPEND_TIMEOUT, v)),
        ];
        let mut attributes = vec![u32_attribute(NETDEV_A_NAPI_ID, id.0)];
        attributes.extend(values.into_iter().flatten());
        let message = GenericMessage {
            family: self.family,
            command: NETDEV_CMD_NAPI_SET,
            attributes,
        };
        let what = format!("set NAPI instance {id} to {settings}");
        self.socket
            .transact(&[Request::change(what, 0, &message)])
            .map_err(|error| {
                let wants_busy_poll = settings.threaded == Some(Threaded::BusyPoll);
                match error.errno() {
                    Some(libc::ENOENT) => Error::NotFound {
                        what: format!("NAPI instance {id}"),
                    },
                    Some(libc::EOPNOTSUPP) => unsupported(NAPI_SET, &error),
                    // The value, or the whole attribute, is not in the kernel's policy.
                    Some(libc::ERANGE | libc::EINVAL) if wants_busy_poll => {
                        unsupported(BUSY_POLL, &error)
                    }
                    Some(libc::EINVAL) if settings.threaded.is_some() => {
                        unsupported(THREADED, &error)
                    }
                    _ => error,
                }
            })
    }
}

impl std::fmt::Display for NapiSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let threaded = self.threaded.map(|t| match t {
            Threaded::Disabled => "disabled",
            Threaded::Enabled => "enabled",
            Threaded::BusyPoll => "busy-poll",
        });
        let values = [
            threaded.map(|v| format!("threaded={v}")),
            self.gro_flush_timeout
                .map(|v| format!("gro-flush-timeout={v}")),
            self.defer_hard_irqs.map(|v| format!("defer-hard-irqs={v}")),
            self.irq_suspend_timeout
                .map(|v| format!("irq-suspend-timeout={v}")),
        ];
        f.write_str(&values.into_iter().flatten().collect::<Vec<_>>().join(" "))
    }
}

fn unsupported(feature: &'static str, error: &Error) -> Error {
    Error::Unsupported {
        feature,
        reason: error.to_string(),
    }
}

fn read_napi(bytes: &[u8]) -> Option<Napi> {
    let (mut id, mut ifindex) = (None, None);
    let (mut pid, mut threaded, mut defer_hard_irqs) = (None, None, None);
    let (mut gro_flush_timeout, mut irq_suspend_timeout) = (None, None);
    for (kind, value) in attributes(bytes) {
        match kind {
            NETDEV_A_NAPI_ID => id = u32_at(value, 0).map(NapiId),
            NETDEV_A_NAPI_IFINDEX => ifindex = u32_at(value, 0).map(IfIndex),
            NETDEV_A_NAPI_PID => pid = u32_at(value, 0),
            NETDEV_A_NAPI_THREADED => threaded = u32_at(value, 0).and_then(Threaded::from_kernel),
            NETDEV_A_NAPI_DEFER_HARD_IRQS => defer_hard_irqs = u32_at(value, 0),
            NETDEV_A_NAPI_GRO_FLUSH_TIMEOUT => gro_flush_timeout = uint(value),
            NETDEV_A_NAPI_IRQ_SUSPEND_TIMEOUT => irq_suspend_timeout = uint(value),
            _ => {}
        }
    }
    Some(Napi {
        id: id?,
        ifindex: ifindex?,
        pid,
        threaded,
        gro_flush_timeout,
        defer_hard_irqs,
        irq_suspend_timeout,
    })
}

/// The type `uint` of the specification: four or eight bytes, as the value needs.
fn uint(value: &[u8]) -> Option<u64> {
    u64_at(value, 0).or_else(|| u32_at(value, 0).map(u64::from))
}
