//! The supervisor of a pod's trapped system calls: gives sockets and epoll instances their busy-poll window.
