//! The arguments of `ctr run`.

use std::path::Path;

use crate::Rootfs;

/// The runtime of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    /// containerd's own shim: what kbp is compared with, and what shows that a test is right.
    Stock,
    /// kbp's shim.
    Kbp,
}

impl Runtime {
    /// Its name as containerd knows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stock => "io.containerd.runc.v2",
            Self::Kbp => "io.containerd.kbp.v1",
        }
    }
}

/// One container for `ctr run`.
#[derive(Debug, Clone)]
pub struct Run {
    id: String,
    image: String,
    runtime: String,
    flags: Vec<String>,
    command: Vec<String>,
    detached: bool,
    spec: bool,
}

impl Run {
    /// A container whose root is `rootfs` itself: no image, no snapshot.
    pub fn new<S: Into<String>>(
        id: &str,
        rootfs: &Rootfs,
        command: impl IntoIterator<Item = S>,
    ) -> Self {
        let mut run = Self::image(id, &rootfs.dir().display().to_string(), command);
        run.flags.push("--rootfs".to_owned());
        // There is no image that would say so.
        run.flag(
            "--env",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
    }

    /// A container of an imported image; an empty command runs the image's own.
    pub fn image<S: Into<String>>(
        id: &str,
        image: &str,
        command: impl IntoIterator<Item = S>,
    ) -> Self {
        Self {
            id: id.to_owned(),
            image: image.to_owned(),
            runtime: Runtime::Stock.name().to_owned(),
            flags: Vec::new(),
            command: command.into_iter().map(Into::into).collect(),
            detached: false,
            spec: false,
        }
    }

    /// A container of a whole `config.json`.
    pub fn spec(id: &str, config: &Path) -> Self {
        let mut run = Self::image::<String>(id, "", []);
        run.spec = true;
        run.flag("--config", config.display())
    }

    /// Its runtime; the stock one unless told.
    pub fn runtime(mut self, runtime: Runtime) -> Self {
        self.runtime = runtime.name().to_owned();
        self
    }

    /// Its runtime by name or by the path of a shim.
    pub fn runtime_named(mut self, name: &str) -> Self {
        self.runtime = name.to_owned();
        self
    }

    /// Joins the network namespace at `path` (as it is inside the sandbox).
    pub fn netns(self, path: &Path) -> Self {
        self.flag("--with-ns", format!("network:{}", path.display()))
    }

    /// With containerd's default seccomp profile.
    pub fn seccomp(self) -> Self {
        self.switch("--seccomp")
    }

    /// With an annotation of the OCI spec.
    pub fn annotation(self, key: &str, value: &str) -> Self {
        self.flag("--annotation", format!("{key}={value}"))
    }

    /// With a bind mount.
    pub fn bind(self, source: &Path, target: &str) -> Self {
        self.flag(
            "--mount",
            format!(
                "type=bind,src={},dst={target},options=rbind:rw",
                source.display()
            ),
        )
    }

    /// With a terminal.
    pub fn tty(self) -> Self {
        self.switch("--tty")
    }

    /// Started only; otherwise `ctr run` waits for the end of the container and removes it.
    pub fn detached(mut self) -> Self {
        self.detached = true;
        self
    }

    /// Another flag of `ctr run` with its value.
    pub fn flag(mut self, name: &str, value: impl std::fmt::Display) -> Self {
        self.flags.extend([name.to_owned(), value.to_string()]);
        self
    }

    /// Another flag of `ctr run` without value.
    pub fn switch(mut self, name: &str) -> Self {
        self.flags.push(name.to_owned());
        self
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The arguments for `ctr`.
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = vec![
            "run".to_owned(),
            "--runtime".to_owned(),
            self.runtime.clone(),
        ];
        arguments.push(if self.detached { "--detach" } else { "--rm" }.to_owned());
        self.describe(&mut arguments);
        arguments
    }

    /// The arguments for a `ctr` that makes the container and no task of it.
    pub fn create_arguments(&self) -> Vec<String> {
        let mut arguments: Vec<String> = ["containers", "create", "--runtime", &self.runtime]
            .map(str::to_owned)
            .to_vec();
        self.describe(&mut arguments);
        arguments
    }

    fn describe(&self, arguments: &mut Vec<String>) {
        arguments.extend(self.flags.iter().cloned());
        if !self.spec {
            arguments.push(self.image.clone());
        }
        arguments.push(self.id.clone());
        arguments.extend(self.command.iter().cloned());
    }
}
