//! Calling IPAM: the built-in one, or a plugin found in CNI_PATH, with our environment and the whole config on stdin.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::config::Config;
use super::env::{Call, Verb};
use super::error::{CniError, Code, Result};
use super::exec::{Outcome, Running, Starting};
use super::ipam::Lease;
use super::version::Version;
use crate::attachment::Attachment;
use crate::ipam_local::{self, LocalIpam};

/// The IPAM of a config.
#[derive(Debug)]
pub(crate) enum Ipam<'a> {
    /// Inside this process.
    Local(LocalIpam<'a>),
    /// A program.
    Plugin(Plugin<'a>),
}

impl<'a> Ipam<'a> {
    /// Finds the one that the config names.
    pub(crate) fn find(config: &'a Config, call: &'a Call) -> Result<Self> {
        if config.ipam_type()? == ipam_local::TYPE {
            return LocalIpam::new(config, call).map(Self::Local);
        }
        Plugin::find(config, call).map(Self::Plugin)
    }

    /// Gets ready to lease addresses: a plugin is started, but not told yet what to do. Half of the time that it takes is its
    /// start, which is over when the caller knows that nothing is to be refused. A plugin that is not told is killed.
    pub(crate) fn prepare_add(&'a self) -> Prepared<'a> {
        match self {
            Self::Local(local) => Prepared::Local(local),
            Self::Plugin(plugin) => Prepared::Plugin(plugin, plugin.begin_start(Verb::Add)),
        }
    }

    /// Gives the leases of this call's attachment back.
    pub(crate) fn del(&self) -> Result<()> {
        match self {
            Self::Local(local) => local.del(),
            Self::Plugin(plugin) => plugin.call(Verb::Del, &[]).map(drop),
        }
    }

    /// Has the leases of this call's attachment checked.
    pub(crate) fn check(&self) -> Result<()> {
        match self {
            Self::Local(local) => local.check(),
            Self::Plugin(plugin) => plugin.call(Verb::Check, &[]).map(drop),
        }
    }

    /// Gives back the leases of all attachments that are not valid any more. `gone` are those of them that were
    /// seen: a plugin that is too old for GC gets a DEL for each.
    pub(crate) fn gc(&self, gone: &[Attachment]) -> Vec<CniError> {
        match self {
            Self::Local(local) => local.gc().err().into_iter().collect(),
            Self::Plugin(plugin) => plugin.gc(gone),
        }
    }

    /// Tells whether an ADD could work. A plugin is asked when it knows STATUS.
    pub(crate) fn status(&self) -> Result<()> {
        match self {
            Self::Local(local) => local.status(),
            Self::Plugin(plugin) => plugin.status(),
        }
    }
}

/// What is about to lease addresses.
#[derive(Debug)]
pub(crate) enum Prepared<'a> {
    /// The built-in IPAM.
    Local(&'a LocalIpam<'a>),
    /// A plugin that is being started and will wait for its input, or why it is not.
    Plugin(&'a Plugin<'a>, Result<Starting>),
}

impl<'a> Prepared<'a> {
    /// Begins to lease. A plugin works from here on, beside whatever the caller does until it asks for what was leased.
    pub(crate) fn begin(self) -> Leasing<'a> {
        match self {
            Self::Local(local) => Leasing::Done(local.add()),
            Self::Plugin(plugin, started) => {
                let mut starting = match started {
                    Ok(starting) => starting,
                    Err(error) => return Leasing::NotStarted(error),
                };
                match starting.give(&plugin.config.raw) {
                    Ok(()) => Leasing::Starting(plugin, starting),
                    Err(error) => Leasing::Done(Err(plugin.broke(Verb::Add, &error))),
                }
            }
        }
    }
}

/// Addresses that are being leased.
#[derive(Debug)]
pub(crate) enum Leasing<'a> {
    /// It is over.
    Done(Result<Lease>),
    /// It never began: there is a plugin, but the kernel cannot run it.
    NotStarted(CniError),
    /// A plugin works on it, or will as soon as it has started.
    Starting(&'a Plugin<'a>, Starting),
}

/// Why there are no addresses.
#[derive(Debug)]
pub(crate) struct NotLeased {
    /// Why.
    pub(crate) error: CniError,
    /// Whether there may be a lease all the same. A plugin that reported its own error has undone what it did, and what is
    /// leased under this id may belong to an attachment that lives; one that broke or was killed may have leased already.
    pub(crate) may_be_leased: bool,
}

impl NotLeased {
    fn begun(error: CniError) -> Self {
        let may_be_leased = matches!(error.code, Code::TRY_AGAIN | Code::DECODE | Code::IPAM);
        Self {
            error,
            may_be_leased,
        }
    }

    fn not_begun(error: CniError) -> Self {
        Self {
            error,
            may_be_leased: false,
        }
    }
}

/// Addresses that are leased as far as can be told.
#[derive(Debug)]
pub(crate) struct Leased<'a> {
    /// The addresses.
    pub(crate) lease: Lease,
    /// Whether that was its last word.
    pub(crate) promise: Promise<'a>,
}

/// A plugin that has answered and not ended yet. Taking a program down costs the kernel as much time as the addresses
/// take to configure, so the one is done beside the other; the answer counts only when the plugin has ended well.
#[derive(Debug, Default)]
pub(crate) struct Promise<'a>(Option<(&'a Plugin<'a>, Running)>);

impl Promise<'_> {
    /// Waits for the plugin's end.
    pub(crate) fn keep(self) -> Result<()> {
        match self.0 {
            None => Ok(()),
            Some((plugin, running)) => plugin
                .finish(running, Verb::Add, &plugin.config.raw)
                .map(drop),
        }
    }
}

impl<'a> Leasing<'a> {
    /// The addresses, as soon as they are there.
    pub(crate) fn finish(self) -> std::result::Result<Leased<'a>, NotLeased> {
        match self {
            Self::NotStarted(error) => Err(NotLeased::not_begun(error)),
            Self::Done(lease) => lease.map_err(NotLeased::begun).map(|lease| Leased {
                lease,
                promise: Promise::default(),
            }),
            Self::Starting(plugin, starting) => match starting.started() {
                Ok(running) => plugin.add(running).map_err(NotLeased::begun),
                Err(error) => {
                    let error = plugin.did_not_start(Verb::Add, &error);
                    Err(NotLeased::not_begun(error))
                }
            },
        }
    }
}

/// An IPAM plugin.
#[derive(Debug)]
pub(crate) struct Plugin<'a> {
    config: &'a Config,
    name: &'a str,
    binary: PathBuf,
    timeout: Duration,
}

impl<'a> Plugin<'a> {
    /// Finds the plugin that the config names.
    fn find(config: &'a Config, call: &Call) -> Result<Self> {
        let name = config.ipam_type()?;
        let timeout = config.ipam_timeout()?;
        let binary = call
            .plugin_dirs
            .iter()
            .map(|dir| dir.join(name))
            .find(|path| is_executable(path));
        let binary = binary.ok_or_else(|| {
            let dirs: Vec<_> = call.plugin_dirs.iter().map(|dir| dir.display().to_string()).collect();
            let place = if dirs.is_empty() { "CNI_PATH is empty".to_owned() } else { format!("CNI_PATH is {}", dirs.join(":")) };
            CniError::new(
                Code::IPAM,
                format!("IPAM plugin {name:?} is not found: {place}; install it there or correct ipam.type"),
            )
        })?;
        Ok(Self {
            config,
            name,
            binary,
            timeout,
        })
    }

    /// The addresses that a started ADD leases.
    fn add(&'a self, mut running: Running) -> Result<Leased<'a>> {
        let answer = running.answer(&self.config.raw, whole_result);
        if let Some(lease) = answer.map_err(|error| self.broke(Verb::Add, &error))? {
            return Ok(Leased {
                lease,
                promise: Promise(Some((self, running))),
            });
        }
        // Everything else is judged by how it ends.
        let first = self.finish(running, Verb::Add, &self.config.raw);
        let json = self.in_its_version(first, Verb::Add, &[])?;
        let lease = Lease::from_json(&json).map_err(|error| self.told(error))?;
        if lease.ips.is_empty() {
            let keys: Vec<_> = json.keys().map(String::as_str).collect();
            return Err(CniError::new(
                Code::IPAM,
                format!(
                    "IPAM plugin {} returned no address; its result has the keys {}",
                    self.name,
                    keys.join(", ")
                ),
            ));
        }
        Ok(Leased {
            lease,
            promise: Promise::default(),
        })
    }

    /// Forwards GC. A plugin that is too old for it gets a DEL for each of `gone`.
    fn gc(&self, gone: &[Attachment]) -> Vec<CniError> {
        match self.versions() {
            Ok(versions) if versions.contains(&Version::V1_1_0) => {
                self.call(Verb::Gc, &[]).err().into_iter().collect()
            }
            Ok(_) => gone
                .iter()
                .filter_map(|gone| self.del_other(gone).err())
                .collect(),
            Err(error) => vec![error],
        }
    }

    /// Gives the leases of another attachment back, whose namespace is not known.
    fn del_other(&self, attachment: &Attachment) -> Result<()> {
        let environment = [
            ("CNI_CONTAINERID", attachment.container_id.as_str()),
            ("CNI_IFNAME", &attachment.ifname),
            ("CNI_NETNS", ""),
        ];
        self.call(Verb::Del, &environment).map(drop)
    }

    /// Forwards STATUS to a plugin that knows it.
    fn status(&self) -> Result<()> {
        let versions = self.versions().map_err(|error| CniError {
            code: Code::NOT_AVAILABLE,
            ..error
        })?;
        if versions.contains(&Version::V1_1_0) {
            self.call(Verb::Status, &[])?;
        }
        Ok(())
    }

    /// The versions that the plugin speaks, those of them that kbp knows.
    fn versions(&self) -> Result<Vec<Version>> {
        let request = json!({ "cniVersion": self.config.version.as_str() }).to_string();
        let json = self.execute(Verb::Version, request.as_bytes(), &[])?;
        let list = json.get("supportedVersions").and_then(Value::as_array);
        Ok(list
            .into_iter()
            .flatten()
            .filter_map(|version| Version::find(version.as_str()?))
            .collect())
    }

    /// Calls it in the config's version. A plugin that is too old for it (Debian 12's know 1.0.0 at most) gets
    /// the config in the newest version that it speaks: its result says nothing that depends on that.
    fn call(&self, verb: Verb, environment: &[(&str, &str)]) -> Result<Map<String, Value>> {
        let first = self.execute(verb, &self.config.raw, environment);
        self.in_its_version(first, verb, environment)
    }

    fn in_its_version(
        &self,
        first: Result<Map<String, Value>>,
        verb: Verb,
        environment: &[(&str, &str)],
    ) -> Result<Map<String, Value>> {
        let error = match first {
            Err(error) if error.code == Code::VERSION => error,
            other => return other,
        };
        let common = self
            .versions()?
            .into_iter()
            .filter(|version| *version < self.config.version)
            .max();
        let Some(common) = common else {
            return Err(error);
        };
        let mut json = self.config.json.clone();
        json.insert("cniVersion".to_owned(), json!(common.as_str()));
        if let Some(Value::Object(previous)) = json.get_mut("prevResult") {
            previous.insert("cniVersion".to_owned(), json!(common.as_str()));
        }
        self.execute(
            verb,
            Value::Object(json).to_string().as_bytes(),
            environment,
        )
    }

    fn execute(
        &self,
        verb: Verb,
        input: &[u8],
        environment: &[(&str, &str)],
    ) -> Result<Map<String, Value>> {
        let running = self.start(verb, environment)?;
        self.finish(running, verb, input)
    }

    fn command(&self, verb: Verb, environment: &[(&str, &str)]) -> Command {
        let mut command = Command::new(&self.binary);
        command.envs(environment.iter().copied());
        // An environment that is not ours is made anew, variable by variable.
        if std::env::var_os("CNI_COMMAND").is_none_or(|ours| ours != verb.as_str()) {
            command.env("CNI_COMMAND", verb.as_str());
        }
        command
    }

    fn begin_start(&self, verb: Verb) -> Result<Starting> {
        Starting::begin(self.command(verb, &[]), self.timeout)
            .map_err(|error| self.broke(verb, &error))
    }

    fn start(&self, verb: Verb, environment: &[(&str, &str)]) -> Result<Running> {
        Running::start(&mut self.command(verb, environment), self.timeout)
            .map_err(|error| self.did_not_start(verb, &error))
    }

    fn did_not_start(&self, verb: Verb, error: &std::io::Error) -> CniError {
        let mut error = self.broke(verb, error);
        error.msg.push_str(
            "; is it a program for this machine, and is there the interpreter that it names?",
        );
        error
    }

    fn finish(&self, running: Running, verb: Verb, input: &[u8]) -> Result<Map<String, Value>> {
        let outcome = running.finish(input);
        self.judge(verb, &outcome.map_err(|error| self.broke(verb, &error))?)
    }

    fn broke(&self, verb: Verb, error: &std::io::Error) -> CniError {
        let binary = self.binary.display();
        CniError::new(
            Code::IPAM,
            format!("run {binary} {}: {error}", verb.as_str()),
        )
    }

    /// What the plugin's exit status and outputs mean.
    fn judge(&self, verb: Verb, outcome: &Outcome) -> Result<Map<String, Value>> {
        let (name, verb) = (self.name, verb.as_str());
        let stderr = excerpt(&outcome.stderr);
        let Some(status) = outcome.status else {
            let msg = format!(
                "IPAM plugin {name} did not answer {verb} within {} s and was killed; try again, or raise ipamTimeout",
                self.timeout.as_secs(),
            );
            return Err(CniError::new(Code::TRY_AGAIN, msg).with_details(&stderr));
        };
        let answer: Option<Map<String, Value>> = serde_json::from_slice(&outcome.stdout).ok();
        if !status.success() {
            return Err(match answer.as_ref().and_then(error_of) {
                Some(error) => self.told(error),
                None => CniError::new(
                    Code::IPAM,
                    format!(
                        "IPAM plugin {name} failed {verb} without a CNI error on stdout: {status}"
                    ),
                )
                .with_details(&excerpt(&outcome.stdout)),
            }
            .with_details(&stderr));
        }
        if !stderr.is_empty() {
            eprintln!("{name}: {stderr}");
        }
        match answer {
            Some(answer) => Ok(answer),
            None if outcome.stdout.iter().all(u8::is_ascii_whitespace) => Ok(Map::new()),
            None => Err(CniError::new(
                Code::DECODE,
                format!(
                    "IPAM plugin {name} answered {verb} with something else than a JSON object"
                ),
            )
            .with_details(&excerpt(&outcome.stdout))),
        }
    }

    /// An error that the plugin caused.
    fn told(&self, error: CniError) -> CniError {
        CniError {
            msg: format!("IPAM plugin {}: {}", self.name, error.msg),
            ..error
        }
    }
}

/// A result with addresses, as soon as all of it is there; None also for whatever else may come.
fn whole_result(stdout: &[u8]) -> Option<Lease> {
    // Without this every part of a long answer would be parsed in vain.
    if stdout.trim_ascii_end().last() != Some(&b'}') {
        return None;
    }
    let json: Map<String, Value> = serde_json::from_slice(stdout).ok()?;
    let lease = Lease::from_json(&json).ok()?;
    (error_of(&json).is_none() && !lease.ips.is_empty()).then_some(lease)
}

/// A CNI error, None when the object is something else.
fn error_of(answer: &Map<String, Value>) -> Option<CniError> {
    let code = answer.get("code")?.as_u64()?.try_into().ok()?;
    let text = |key| {
        answer
            .get(key)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    Some(CniError {
        code: Code(code),
        msg: text("msg"),
        details: text("details"),
    })
}

/// The end of an output, where programs say what killed them.
fn excerpt(output: &[u8]) -> String {
    const MAX: usize = 1024;
    let tail = &output[output.len().saturating_sub(MAX)..];
    String::from_utf8_lossy(tail).trim().to_owned()
}

fn is_executable(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}
