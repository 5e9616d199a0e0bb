//! Faults of and between programs: a proxy that swallows bytes, a process that is frozen, and one whose clock is wrong.

use std::io::{Read, Write};
use std::net::{Shutdown as Close, TcpListener, TcpStream};
#[cfg(target_os = "linux")]
use std::path::PathBuf;
use std::process::Command;
#[cfg(target_os = "linux")]
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use crate::agent::Variables;
#[cfg(target_os = "linux")]
use crate::scratch;

pub fn signal(pid: &str, name: &str) {
    let status = Command::new("kill")
        .args([&format!("-{name}"), pid])
        .status()
        .unwrap();
    assert!(status.success(), "kill -{name} {pid}");
}

/// A stopped process. It continues when this is dropped, also if the test fails.
pub struct Thaw(pub String);

impl Drop for Thaw {
    fn drop(&mut self) {
        // The other side may be gone already.
        Command::new("kill").args(["-CONT", &self.0]).output().ok();
    }
}

/// Replaces the functions of libc by which Rust and librdkafka read the wall clock, and the one by which librdkafka waits for it.
#[cfg(target_os = "linux")]
const WRONG_CLOCK: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <threads.h>
#include <time.h>
#include <unistd.h>
static int ahead(void) { return atoi(getenv("CLOCK_AHEAD")); }
int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = syscall(SYS_clock_gettime, clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += ahead();
    return result;
}
int gettimeofday(struct timeval *now, void *zone) {
    int result = syscall(SYS_gettimeofday, now, zone);
    now->tv_sec += ahead();
    return result;
}
int cnd_timedwait(cnd_t *condition, mtx_t *mutex, const struct timespec *until) {
    int (*next)(cnd_t *, mtx_t *, const struct timespec *) = dlsym(RTLD_NEXT, "cnd_timedwait");
    struct timespec real = *until;
    real.tv_sec -= ahead();
    return next(condition, mutex, &real);
}
"#;

/// The wall clock of a program with these variables is that many seconds ahead.
#[cfg(target_os = "linux")]
pub fn with_clock(variables: &Variables, seconds_ahead: i64) -> Variables {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    let library = LIBRARY.get_or_init(|| {
        let directory = scratch::directory("clock");
        let (source, library) = (directory.join("clock.c"), directory.join("clock.so"));
        std::fs::write(&source, WRONG_CLOCK).unwrap();
        let mut cc = Command::new("cc");
        cc.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source);
        assert!(cc.status().unwrap().success(), "{cc:?}");
        library
    });
    let variables = variables.clone().with("CLOCK_AHEAD", seconds_ahead);
    variables.with("LD_PRELOAD", library.display())
}

/// Only Linux can do that.
#[cfg(not(target_os = "linux"))]
pub fn with_clock(variables: &Variables, _seconds_ahead: i64) -> Variables {
    variables.clone()
}

/// A proxy that passes bytes between clients and a server, or swallows them while the connections stay open.
pub struct Proxy {
    pub port: u16,
    /// Swallows what the server sends.
    pub is_deaf: Arc<AtomicBool>,
    /// Swallows what the clients send.
    pub is_mute: Arc<AtomicBool>,
    clients: Arc<Mutex<Vec<TcpStream>>>,
}

/// Called with the API key of each request to Kafka before it is passed on.
pub type Watch = Arc<dyn Fn(i16) + Send + Sync>;

impl Proxy {
    pub fn start(to: u16) -> Self {
        Self::start_with(to, None)
    }

    /// A proxy in front of Kafka.
    pub fn start_watched(to: u16, watch: Watch) -> Self {
        Self::start_with(to, Some(watch))
    }

    fn start_with(to: u16, watch: Option<Watch>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (is_deaf, is_mute) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (deaf, mute) = (Arc::clone(&is_deaf), Arc::clone(&is_mute));
        let clients = Arc::new(Mutex::new(Vec::new()));
        let accepted = Arc::clone(&clients);
        thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.unwrap();
                // If the server does not listen, the client's connection is closed.
                let Ok(server) = TcpStream::connect(("127.0.0.1", to)) else {
                    continue;
                };
                accepted.lock().unwrap().push(client.try_clone().unwrap());
                let (from, to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                match &watch {
                    Some(watch) => pass_requests(from, to, Arc::clone(watch)),
                    None => pass(from, to, Arc::clone(&mute)),
                }
                pass(server, client, Arc::clone(&deaf));
            }
        });
        Self {
            port,
            is_deaf,
            is_mute,
            clients,
        }
    }

    /// Ends all connections.
    pub fn cut(&self) {
        for client in self.clients.lock().unwrap().drain(..) {
            // The other side may be gone already.
            client.shutdown(Close::Both).ok();
        }
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, swallow: Arc<AtomicBool>) {
    thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            if !swallow.load(Ordering::SeqCst) && to.write_all(&bytes[..count]).is_err() {
                break;
            }
        }
        to.shutdown(Close::Both).ok();
    });
}

fn pass_requests(mut from: TcpStream, mut to: TcpStream, watch: Watch) {
    thread::spawn(move || {
        let mut length = [0; 4];
        while from.read_exact(&mut length).is_ok() {
            let mut request = vec![0; u32::from_be_bytes(length) as usize];
            if from.read_exact(&mut request).is_err() {
                break;
            }
            watch(i16::from_be_bytes([request[0], request[1]]));
            if to.write_all(&[&length[..], &request].concat()).is_err() {
                break;
            }
        }
        to.shutdown(Close::Both).ok();
    });
}
