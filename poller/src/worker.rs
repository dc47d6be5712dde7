//! The thread that keeps a worker's lease while packets flow and lets it park when they do not.
