// Replaces the main part by a newer one every 15 seconds, so that nothing moves and no focus is lost. Without this file,
// the page is loaded again by its <meta>, or by hand.
"use strict";
const OLD_AFTER_MS = 120000;

async function renew() {
  const main = document.getElementById("main");
  const all = (selector) => [...main.querySelectorAll(selector)];
  let from = null;
  try {
    const response = await fetch(location.href, { cache: "no-cache" });
    if (response.ok) {
      const newer = new DOMParser().parseFromString(await response.text(), "text/html");
      from = newer.getElementById("main");
      document.title = newer.title;
    }
  } catch {
    // The server is away: the last line says so once the page is old.
  }
  if (from && getSelection().isCollapsed) {
    const open = all("details[open]").map((details) => details.id);
    const scrolled = all(".scroll").map((box) => [box.scrollLeft, box.scrollTop]);
    const focused = all("a, summary, [tabindex]").indexOf(document.activeElement);
    const before = main.querySelector("h1").textContent;
    main.replaceChildren(...from.childNodes);
    main.dataset.at = from.dataset.at;
    for (const details of all("details")) details.open = open.includes(details.id);
    all(".scroll").forEach((box, index) => ([box.scrollLeft, box.scrollTop] = scrolled[index] ?? [0, 0]));
    all("a, summary, [tabindex]")[focused]?.focus({ preventScroll: true });
    const now = main.querySelector("h1").textContent;
    if (now !== before) document.getElementById("news").textContent = now;
  }
  document.getElementById("old").hidden = Date.now() - Date.parse(main.dataset.at) < OLD_AFTER_MS;
}

setInterval(() => document.hidden || renew(), 15000);
document.addEventListener("visibilitychange", () => document.hidden || renew());
