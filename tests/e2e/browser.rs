//! Chromium without a window, driven over WebDriver (W3C) by Debian's chromedriver.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use ureq::Agent;

use crate::scratch::{self, Process, wait_for};

/// The start of both programs on a busy machine, and the slowest command.
const SOON: Duration = Duration::from_secs(60);

pub struct Browser {
    http: Agent,
    session: String,
    _driver: Process,
}

impl Browser {
    pub fn start() -> Self {
        let directory = scratch::directory("browser");
        let log = directory.join("chromedriver");
        let mut command = Command::new(program("chromedriver"));
        command
            .arg("--port=0")
            .env("HOME", &directory)
            .stdin(Stdio::null())
            .stdout(File::create(&log).unwrap())
            .stderr(File::create(directory.join("stderr")).unwrap());
        let driver = Process::start(&mut command);
        let port: u16 = wait_for(
            SOON,
            "chromedriver listens",
            || {
                let text = scratch::text(&log);
                let (_, rest) = text.split_once("started successfully on port ")?;
                rest.split_once('.')?.0.parse().ok()
            },
            || scratch::text(&log) + &scratch::text(&directory.join("stderr")),
        );
        let config = Agent::config_builder()
            .timeout_global(Some(SOON))
            .http_status_as_error(false)
            .proxy(None)
            .build();
        let mut browser = Self {
            http: Agent::new_with_config(config),
            session: format!("http://127.0.0.1:{port}/session"),
            _driver: driver,
        };
        let arguments = [
            "--headless=new",
            // As root, which CI is, Chromium has no sandbox. It opens only the page of this test.
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--hide-scrollbars",
            "--force-color-profile=srgb",
            "--font-render-hinting=none",
            // Nothing is asked of any other machine.
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ];
        let profile = format!("--user-data-dir={}", directory.join("profile").display());
        let arguments: Vec<&str> = arguments.into_iter().chain([profile.as_str()]).collect();
        let options = json!({"binary": program("chromium"), "args": arguments});
        let wanted = json!({"capabilities": {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}});
        let started = browser.send("", &wanted);
        let id = started["sessionId"].as_str().expect("a session").to_owned();
        browser.session = format!("{}/{id}", browser.session);
        browser
    }

    /// Sends a command of WebDriver; returns its value.
    fn send(&self, command: &str, body: &Value) -> Value {
        let url = format!("{}{command}", self.session);
        let request = self.http.post(&url).header("content-type", "application/json");
        let mut response = request.send(body.to_string()).unwrap();
        let text = response.body_mut().read_to_string().unwrap();
        let answer: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{command}: {text}"));
        assert!(
            response.status().is_success(),
            "{command} {body:.300}: {answer:#}"
        );
        answer["value"].clone()
    }

    /// A command of Chromium's own protocol.
    fn devtools(&self, command: &str, parameters: &Value) -> Value {
        self.send(
            "/goog/cdp/execute",
            &json!({"cmd": command, "params": parameters}),
        )
    }

    pub fn open(&self, url: &str) {
        self.send("/url", &json!({"url": url}));
    }

    /// The size of the page's view in CSS pixels, and the colour scheme that the reader prefers.
    pub fn show_as(&self, width: u32, height: u32, scheme: &str) {
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        self.devtools("Emulation.setDeviceMetricsOverride", &size);
        let scheme = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.devtools("Emulation.setEmulatedMedia", &scheme);
    }

    /// Shows the page as it is printed by a reader who prefers a dark scheme.
    pub fn show_printed(&self) {
        let scheme = json!([{"name": "prefers-color-scheme", "value": "dark"}]);
        let media = json!({"media": "print", "features": scheme});
        self.devtools("Emulation.setEmulatedMedia", &media);
    }

    /// Whether pages may run scripts, from the next one on.
    pub fn allow_scripts(&self, is_allowed: bool) {
        self.devtools(
            "Emulation.setScriptExecutionDisabled",
            &json!({"value": !is_allowed}),
        );
    }

    /// The value of a JavaScript expression in the page.
    pub fn value(&self, expression: &str) -> Value {
        let parameters = json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        let answer = self.devtools("Runtime.evaluate", &parameters);
        assert!(
            answer["exceptionDetails"].is_null(),
            "{expression:.300}: {answer:#}"
        );
        answer["result"]["value"].clone()
    }

    pub fn text(&self, expression: &str) -> String {
        let value = self.value(expression);
        value
            .as_str()
            .unwrap_or_else(|| panic!("{expression}: {value}"))
            .to_owned()
    }

    /// Clicks the first element, as a mouse does.
    pub fn click(&self, selector: &str) {
        let found = self.send("/element", &json!({"using": "css selector", "value": selector}));
        let id = found
            .as_object()
            .and_then(|found| found.values().next()?.as_str())
            .expect("an element");
        self.send(&format!("/element/{id}/click"), &json!({}));
    }

    /// Presses keys, named as in WebDriver.
    pub fn press(&self, key: &str) {
        let actions = json!([{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]);
        self.send(
            "/actions",
            &json!({"actions": [{"type": "key", "id": "keyboard", "actions": actions}]}),
        );
    }

    /// What the page and the browser complain about: scripts that fail, resources that the policy forbids.
    pub fn complaints(&self) -> Vec<String> {
        let log = self.send("/se/log", &json!({"type": "browser"}));
        let entries = log.as_array().cloned().unwrap_or_default();
        entries.iter().map(|entry| entry["message"].to_string()).collect()
    }

    /// A PNG of the view.
    pub fn picture(&self) -> Vec<u8> {
        let picture = self.devtools("Page.captureScreenshot", &json!({"format": "png"}));
        let data = picture["data"].as_str().expect("a picture");
        openssl::base64::decode_block(data).unwrap()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Ends Chromium too; killed alone, chromedriver would leave it.
        self.http.delete(&self.session).call().ok();
    }
}

fn program(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|directory| directory.join(name))
        .find(|path| path.exists());
    found.unwrap_or_else(|| panic!("{name} is not installed; `make setup` installs it"))
}

/// axe-core, which `scripts/setup test` downloads.
pub fn axe() -> String {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join(".cache/axe/axe.min.js");
    fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{}: {error}; `make setup` downloads it", path.display()))
}
