//! What every client of containerd expects of a runtime: exit codes, input and output, terminals, exec, signals, pause, deletion.
//! Every scenario runs under the stock shim too: where that one passes, kbp must.

mod exec;
mod output;
mod signals;
mod tasks;
