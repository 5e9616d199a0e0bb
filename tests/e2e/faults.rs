//! Faults between two programs: a proxy that swallows bytes, and a process that is frozen.

use std::io::{Read, Write};
use std::net::{Shutdown as Close, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

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

/// A proxy that passes bytes between clients and a server, or swallows them while the connections stay open.
pub struct Proxy {
    pub port: u16,
    /// Swallows what the server sends.
    pub is_deaf: Arc<AtomicBool>,
    /// Swallows what the clients send.
    pub is_mute: Arc<AtomicBool>,
    clients: Arc<Mutex<Vec<TcpStream>>>,
}

impl Proxy {
    pub fn start(to: u16) -> Self {
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
                pass(
                    client.try_clone().unwrap(),
                    server.try_clone().unwrap(),
                    Arc::clone(&mute),
                );
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
