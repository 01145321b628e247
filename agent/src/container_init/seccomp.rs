//! Which system calls a container's programs may make (seccomp(2)): an allow-list, everything else fails with EPERM.
//!
//! The list is that of container engines: what programs use, without what manages the machine, loads code into the kernel,
//! or has no business in a container (bpf, keyctl, io_uring, userfaultfd, perf, kexec, the mount interface). A capability that
//! the container has brings the calls that mean nothing without it. `clone3` fails with ENOSYS, so that libraries fall back to
//! `clone`, whose flags a filter can see. The lists are pure; only `apply` acts.

use std::collections::{BTreeMap, HashSet};

use caps::Capability;
use nix::libc;
use protocol::imageset::Profile;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::privileges::Capabilities;
use super::{InitError, step};
use crate::sys::process::set_seccomp_filter;

/// The `CLONE_NEW…` flags of clone(2) and unshare(2): mnt, cgroup, uts, ipc, user, pid, net, and time.
const NAMESPACES: u64 = 0x7e02_0000 | 0x80;
/// `AF_VSOCK` of socket(2): a way to the machine below this one.
const AF_VSOCK: u64 = 40;
/// personality(2): the ones that do not switch randomisation off. 0xffffffff asks.
const PERSONALITIES: [u64; 5] = [0x0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

// Numbers that the libc crate does not have: these are the same on every architecture.
const SYS_CACHESTAT: i64 = 451;
const SYS_FUTEX_WAKE: i64 = 454;
const SYS_FUTEX_WAIT: i64 = 455;
const SYS_FUTEX_REQUEUE: i64 = 456;
const SYS_IO_PGETEVENTS: i64 = if cfg!(target_arch = "x86_64") { 333 } else { 292 };

/// Every program's calls, on every architecture.
#[rustfmt::skip]
const COMMON: &[i64] = &[
    libc::SYS_accept, libc::SYS_accept4, libc::SYS_adjtimex, libc::SYS_bind, libc::SYS_brk, SYS_CACHESTAT,
    libc::SYS_capget, libc::SYS_capset, libc::SYS_chdir, libc::SYS_clock_adjtime, libc::SYS_clock_getres,
    libc::SYS_clock_gettime, libc::SYS_clock_nanosleep, libc::SYS_close, libc::SYS_close_range, libc::SYS_connect,
    libc::SYS_copy_file_range, libc::SYS_dup, libc::SYS_dup3, libc::SYS_epoll_create1, libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait, libc::SYS_epoll_pwait2, libc::SYS_eventfd2, libc::SYS_execve, libc::SYS_execveat, libc::SYS_exit,
    libc::SYS_exit_group, libc::SYS_faccessat, libc::SYS_faccessat2, libc::SYS_fadvise64, libc::SYS_fallocate,
    libc::SYS_fanotify_mark, libc::SYS_fchdir, libc::SYS_fchmod, libc::SYS_fchmodat, libc::SYS_fchmodat2, libc::SYS_fchown,
    libc::SYS_fchownat, libc::SYS_fcntl, libc::SYS_fdatasync, libc::SYS_fgetxattr, libc::SYS_flistxattr, libc::SYS_flock,
    libc::SYS_fremovexattr, libc::SYS_fsetxattr, libc::SYS_fstat, libc::SYS_fstatfs, libc::SYS_fsync, libc::SYS_ftruncate,
    libc::SYS_futex, libc::SYS_futex_waitv, SYS_FUTEX_WAIT, SYS_FUTEX_WAKE, SYS_FUTEX_REQUEUE,
    libc::SYS_getcpu, libc::SYS_getcwd, libc::SYS_getdents64, libc::SYS_getegid, libc::SYS_geteuid, libc::SYS_getgid,
    libc::SYS_getgroups, libc::SYS_getitimer, libc::SYS_getpeername, libc::SYS_getpgid, libc::SYS_getpid, libc::SYS_getppid,
    libc::SYS_getpriority, libc::SYS_getrandom, libc::SYS_getresgid, libc::SYS_getresuid, libc::SYS_getrlimit,
    libc::SYS_get_robust_list, libc::SYS_getrusage, libc::SYS_getsid, libc::SYS_getsockname, libc::SYS_getsockopt,
    libc::SYS_gettid, libc::SYS_gettimeofday, libc::SYS_getuid, libc::SYS_getxattr, libc::SYS_inotify_add_watch,
    libc::SYS_inotify_init1, libc::SYS_inotify_rm_watch, libc::SYS_io_cancel, libc::SYS_ioctl, libc::SYS_io_destroy,
    libc::SYS_io_getevents, SYS_IO_PGETEVENTS, libc::SYS_ioprio_get, libc::SYS_ioprio_set, libc::SYS_io_setup,
    libc::SYS_io_submit, libc::SYS_kill, libc::SYS_landlock_add_rule, libc::SYS_landlock_create_ruleset,
    libc::SYS_landlock_restrict_self, libc::SYS_lgetxattr, libc::SYS_linkat, libc::SYS_listen, libc::SYS_listxattr,
    libc::SYS_llistxattr, libc::SYS_lremovexattr, libc::SYS_lseek, libc::SYS_lsetxattr, libc::SYS_madvise, libc::SYS_membarrier,
    libc::SYS_memfd_create, libc::SYS_memfd_secret, libc::SYS_mincore, libc::SYS_mkdirat, libc::SYS_mknodat, libc::SYS_mlock,
    libc::SYS_mlock2, libc::SYS_mlockall, libc::SYS_mmap, libc::SYS_mprotect, libc::SYS_mq_getsetattr, libc::SYS_mq_notify,
    libc::SYS_mq_open, libc::SYS_mq_timedreceive, libc::SYS_mq_timedsend, libc::SYS_mq_unlink, libc::SYS_mremap,
    libc::SYS_msgctl, libc::SYS_msgget, libc::SYS_msgrcv, libc::SYS_msgsnd, libc::SYS_msync, libc::SYS_munlock,
    libc::SYS_munlockall, libc::SYS_munmap, libc::SYS_name_to_handle_at, libc::SYS_nanosleep, libc::SYS_newfstatat,
    libc::SYS_openat, libc::SYS_openat2, libc::SYS_pidfd_open, libc::SYS_pidfd_send_signal, libc::SYS_pipe2,
    libc::SYS_pkey_alloc, libc::SYS_pkey_free, libc::SYS_pkey_mprotect, libc::SYS_ppoll, libc::SYS_prctl, libc::SYS_pread64,
    libc::SYS_preadv, libc::SYS_preadv2, libc::SYS_prlimit64, libc::SYS_process_mrelease, libc::SYS_pselect6,
    libc::SYS_pwrite64, libc::SYS_pwritev, libc::SYS_pwritev2, libc::SYS_read, libc::SYS_readahead, libc::SYS_readlinkat,
    libc::SYS_readv, libc::SYS_recvfrom, libc::SYS_recvmmsg, libc::SYS_recvmsg, libc::SYS_remap_file_pages,
    libc::SYS_removexattr, libc::SYS_renameat, libc::SYS_renameat2, libc::SYS_restart_syscall, libc::SYS_rseq,
    libc::SYS_rt_sigaction, libc::SYS_rt_sigpending, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_sigreturn, libc::SYS_rt_sigsuspend, libc::SYS_rt_sigtimedwait, libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_sched_getaffinity, libc::SYS_sched_getattr, libc::SYS_sched_getparam, libc::SYS_sched_get_priority_max,
    libc::SYS_sched_get_priority_min, libc::SYS_sched_getscheduler, libc::SYS_sched_rr_get_interval,
    libc::SYS_sched_setaffinity, libc::SYS_sched_setattr, libc::SYS_sched_setparam, libc::SYS_sched_setscheduler,
    libc::SYS_sched_yield, libc::SYS_seccomp, libc::SYS_semctl, libc::SYS_semget, libc::SYS_semop, libc::SYS_semtimedop,
    libc::SYS_sendfile, libc::SYS_sendmmsg, libc::SYS_sendmsg, libc::SYS_sendto, libc::SYS_setfsgid, libc::SYS_setfsuid,
    libc::SYS_setgid, libc::SYS_setgroups, libc::SYS_setitimer, libc::SYS_setpgid, libc::SYS_setpriority, libc::SYS_setregid,
    libc::SYS_setresgid, libc::SYS_setresuid, libc::SYS_setreuid, libc::SYS_setrlimit, libc::SYS_set_robust_list,
    libc::SYS_setsid, libc::SYS_setsockopt, libc::SYS_set_tid_address, libc::SYS_setuid, libc::SYS_setxattr, libc::SYS_shmat,
    libc::SYS_shmctl, libc::SYS_shmdt, libc::SYS_shmget, libc::SYS_shutdown, libc::SYS_sigaltstack, libc::SYS_signalfd4,
    libc::SYS_socketpair, libc::SYS_splice, libc::SYS_statfs, libc::SYS_statx, libc::SYS_symlinkat, libc::SYS_sync,
    libc::SYS_sync_file_range, libc::SYS_syncfs, libc::SYS_sysinfo, libc::SYS_tee, libc::SYS_tgkill, libc::SYS_timer_create,
    libc::SYS_timer_delete, libc::SYS_timer_getoverrun, libc::SYS_timer_gettime, libc::SYS_timer_settime,
    libc::SYS_timerfd_create, libc::SYS_timerfd_gettime, libc::SYS_timerfd_settime, libc::SYS_times, libc::SYS_tkill,
    libc::SYS_truncate, libc::SYS_umask, libc::SYS_uname, libc::SYS_unlinkat, libc::SYS_utimensat, libc::SYS_vmsplice,
    libc::SYS_wait4, libc::SYS_waitid, libc::SYS_write, libc::SYS_writev,
];

/// Older forms that only x86-64 has.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const LEGACY: &[i64] = &[
    libc::SYS_access, libc::SYS_alarm, libc::SYS_arch_prctl, libc::SYS_chmod, libc::SYS_chown, libc::SYS_creat, libc::SYS_dup2,
    libc::SYS_epoll_create, libc::SYS_epoll_ctl_old, libc::SYS_epoll_wait, libc::SYS_epoll_wait_old, libc::SYS_eventfd,
    libc::SYS_fork, libc::SYS_futimesat, libc::SYS_getdents, libc::SYS_getpgrp, libc::SYS_inotify_init, libc::SYS_lchown,
    libc::SYS_link, libc::SYS_lstat, libc::SYS_mkdir, libc::SYS_mknod, libc::SYS_modify_ldt, libc::SYS_open, libc::SYS_pause,
    libc::SYS_pipe, libc::SYS_poll, libc::SYS_readlink, libc::SYS_rename, libc::SYS_rmdir, libc::SYS_select,
    libc::SYS_set_thread_area, libc::SYS_get_thread_area, libc::SYS_signalfd, libc::SYS_stat, libc::SYS_symlink, libc::SYS_time,
    libc::SYS_unlink, libc::SYS_ustat, libc::SYS_utime, libc::SYS_utimes, libc::SYS_vfork,
];
#[cfg(not(target_arch = "x86_64"))]
const LEGACY: &[i64] = &[];

/// What a capability makes sense of.
#[rustfmt::skip]
const BY_CAPABILITY: &[(Capability, &[i64])] = &[
    (Capability::CAP_BPF, &[libc::SYS_bpf]),
    (Capability::CAP_DAC_READ_SEARCH, &[libc::SYS_open_by_handle_at]),
    (Capability::CAP_PERFMON, &[libc::SYS_perf_event_open]),
    (Capability::CAP_SYS_ADMIN, &[
        libc::SYS_bpf, libc::SYS_clone, libc::SYS_fanotify_init, libc::SYS_fsconfig, libc::SYS_fsmount, libc::SYS_fsopen,
        libc::SYS_fspick, libc::SYS_mount, libc::SYS_mount_setattr, libc::SYS_move_mount, libc::SYS_open_tree,
        libc::SYS_perf_event_open, libc::SYS_pivot_root, libc::SYS_quotactl, libc::SYS_quotactl_fd, libc::SYS_setdomainname,
        libc::SYS_sethostname, libc::SYS_setns, libc::SYS_swapon, libc::SYS_swapoff, libc::SYS_syslog, libc::SYS_umount2,
        libc::SYS_unshare,
    ]),
    (Capability::CAP_SYS_BOOT, &[libc::SYS_reboot]),
    (Capability::CAP_SYS_CHROOT, &[libc::SYS_chroot]),
    (Capability::CAP_SYS_MODULE, &[libc::SYS_delete_module, libc::SYS_finit_module, libc::SYS_init_module]),
    (Capability::CAP_SYS_NICE, &[libc::SYS_get_mempolicy, libc::SYS_mbind, libc::SYS_migrate_pages, libc::SYS_move_pages, libc::SYS_set_mempolicy]),
    (Capability::CAP_SYS_PACCT, &[libc::SYS_acct]),
    (Capability::CAP_SYS_PTRACE, &[
        libc::SYS_kcmp, libc::SYS_pidfd_getfd, libc::SYS_process_madvise, libc::SYS_process_vm_readv, libc::SYS_process_vm_writev,
        libc::SYS_ptrace,
    ]),
    (Capability::CAP_SYS_TIME, &[libc::SYS_clock_settime, libc::SYS_settimeofday]),
    (Capability::CAP_SYS_TTY_CONFIG, &[libc::SYS_vhangup]),
    (Capability::CAP_SYSLOG, &[libc::SYS_syslog]),
];

/// What a whole system calls besides, whether or not it is then allowed to: systemd takes the kernel's own EPERM, debuggers are
/// part of a system, and a private mount table harms nobody without CAP_SYS_ADMIN.
#[rustfmt::skip]
const SYSTEM: &[i64] = &[
    libc::SYS_mount, libc::SYS_ptrace, libc::SYS_process_vm_readv, libc::SYS_process_vm_writev, libc::SYS_setns,
    libc::SYS_sethostname, libc::SYS_setdomainname, libc::SYS_syslog, libc::SYS_umount2, libc::SYS_unshare, libc::SYS_vhangup,
    libc::SYS_get_mempolicy, libc::SYS_mbind, libc::SYS_set_mempolicy, libc::SYS_pivot_root, libc::SYS_move_mount,
    libc::SYS_open_tree, libc::SYS_mount_setattr, libc::SYS_fsopen, libc::SYS_fsconfig, libc::SYS_fsmount,
];

/// The calls that are let through whatever their arguments are.
#[must_use]
pub fn allowed(profile: Profile, capabilities: &HashSet<Capability>) -> HashSet<i64> {
    let mut calls: HashSet<i64> = COMMON.iter().chain(LEGACY).copied().collect();
    if profile == Profile::System {
        calls.extend(SYSTEM);
    }
    for (capability, more) in BY_CAPABILITY {
        if capabilities.contains(capability) {
            calls.extend(*more);
        }
    }
    calls
}

/// The two programs: one that says ENOSYS to clone3, one with the allow-list. The kernel takes the sterner answer of both.
///
/// # Errors
/// None is known for these lists.
pub fn programs(
    profile: Profile,
    capabilities: &HashSet<Capability>,
) -> Result<[BpfProgram; 2], seccompiler::BackendError> {
    let enosys = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let eperm = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let arch = if cfg!(target_arch = "x86_64") { TargetArch::x86_64 } else { TargetArch::aarch64 };
    let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let first = SeccompFilter::new(clone3, SeccompAction::Allow, enosys, arch)?;

    let calls = allowed(profile, capabilities);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        calls.iter().map(|call| (*call, Vec::new())).collect();
    rules.insert(libc::SYS_clone3, Vec::new());
    let rule = |index, op, value| -> Result<SeccompRule, seccompiler::BackendError> {
        let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, op, value)?;
        SeccompRule::new(vec![condition])
    };
    rules.insert(libc::SYS_socket, vec![rule(0, SeccompCmpOp::Ne, AF_VSOCK)?]);
    let personalities = PERSONALITIES.iter().map(|value| rule(0, SeccompCmpOp::Eq, *value));
    rules.insert(libc::SYS_personality, personalities.collect::<Result<_, _>>()?);
    if !calls.contains(&libc::SYS_clone) {
        let op = match profile {
            // Of namespaces, no new user one: it is a new set of capabilities to attack the kernel with.
            Profile::System => SeccompCmpOp::MaskedEq(libc::CLONE_NEWUSER.unsigned_abs().into()),
            Profile::Service => SeccompCmpOp::MaskedEq(NAMESPACES & !0x80),
        };
        rules.insert(libc::SYS_clone, vec![rule(0, op, 0)?]);
    }
    if calls.contains(&libc::SYS_unshare) && !calls.contains(&libc::SYS_clone) {
        let op = SeccompCmpOp::MaskedEq(libc::CLONE_NEWUSER.unsigned_abs().into());
        rules.insert(libc::SYS_unshare, vec![rule(0, op, 0)?]);
    }
    let second = SeccompFilter::new(rules, eperm, SeccompAction::Allow, arch)?;
    Ok([BpfProgram::try_from(first)?, BpfProgram::try_from(second)?])
}

/// Filters this process's system calls from here on. It must have CAP_SYS_ADMIN, or no_new_privs.
///
/// # Errors
/// The kernel's refusal.
pub(super) fn apply(profile: Profile, capabilities: &Capabilities) -> Result<(), InitError> {
    for program in programs(profile, &capabilities.bounding)? {
        set_seccomp_filter(&program).map_err(step::<std::io::Error>("seccomp"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_attacks_the_kernel_is_on_no_list() {
        let never = [
            libc::SYS_userfaultfd,
            libc::SYS_io_uring_setup,
            libc::SYS_io_uring_enter,
            libc::SYS_io_uring_register,
            libc::SYS_keyctl,
            libc::SYS_add_key,
            libc::SYS_request_key,
            libc::SYS_kexec_load,
            libc::SYS_kexec_file_load,
        ];
        let without_capability = [
            libc::SYS_bpf,
            libc::SYS_perf_event_open,
            libc::SYS_reboot,
            libc::SYS_init_module,
            libc::SYS_finit_module,
            libc::SYS_open_by_handle_at,
            libc::SYS_settimeofday,
            libc::SYS_swapon,
        ];
        let all: HashSet<Capability> = caps::all();
        for profile in [Profile::Service, Profile::System] {
            let (none, every) = (allowed(profile, &HashSet::new()), allowed(profile, &all));
            for call in never {
                assert!(!none.contains(&call) && !every.contains(&call), "{call}");
            }
            for call in without_capability {
                assert!(!none.contains(&call) && every.contains(&call), "{call}");
            }
        }
        let service = allowed(Profile::Service, &HashSet::new());
        for call in [libc::SYS_mount, libc::SYS_unshare, libc::SYS_setns, libc::SYS_ptrace] {
            assert!(!service.contains(&call), "{call}");
        }
    }

    #[test]
    fn both_profiles_compile_and_fit_into_the_kernels_limit() {
        for profile in [Profile::Service, Profile::System] {
            for capabilities in [HashSet::new(), caps::all()] {
                let [first, second] = programs(profile, &capabilities).expect("compile");
                // BPF_MAXINSNS of linux/filter.h.
                assert!(first.len() < 16 && second.len() < 4096, "{}", second.len());
            }
        }
    }
}
