// What the page does by itself: it asks for the parts that follow files, hands clicks in them on, and shows cached scales at once.
(() => {
  const EVERY_MS = 2000;

  async function renew(part) {
    if (part.busy || part.offsetParent === null || document.hidden) return;
    part.busy = true;
    try {
      const headers = part.tag ? { "If-None-Match": part.tag } : {};
      const answer = await fetch(part.dataset.live, { headers, credentials: "same-origin", cache: "no-store" });
      if (answer.status === 200) {
        part.tag = answer.headers.get("ETag");
        const focus = document.activeElement && part.contains(document.activeElement) ? document.activeElement.dataset.send : null;
        const opened = [...part.querySelectorAll("details")].map(one => one.open);
        part.innerHTML = await answer.text();
        part.querySelectorAll("details").forEach((one, i) => { one.open = opened[i] ?? one.open; });
        if (focus) part.querySelector(`[data-send="${CSS.escape(focus)}"]`)?.focus();
      }
      part.classList.remove("lost");
    } catch {
      part.classList.add("lost");  // the server is gone for now: what is shown stays, and is asked for again
    }
    part.busy = false;
  }

  const all = () => document.querySelectorAll("[data-live]").forEach(renew);
  setInterval(all, EVERY_MS);
  new MutationObserver(() => document.querySelectorAll("[data-live]:empty").forEach(renew))
    .observe(document.documentElement, { childList: true, subtree: true });
  document.addEventListener("visibilitychange", all);

  document.addEventListener("click", event => {
    const from = event.target.closest?.("[data-send]");
    const to = from && document.querySelector(`#${from.dataset.to} textarea, #${from.dataset.to} input`);
    if (!to) return;
    to.value = from.dataset.send;
    to.dispatchEvent(new InputEvent("input", { bubbles: true, data: to.value, inputType: "insertText" }));
    to.dispatchEvent(new KeyboardEvent("keypress", { key: "Enter", bubbles: true, cancelable: true }));  // heard twice for one value, too
    setTimeout(() => from.closest("[data-live]") && renew(from.closest("[data-live]")), 700);
  });

  document.addEventListener("input", event => {
    if (!event.target.matches?.("#scale input")) return;
    const kept = document.querySelector("#strip-kept [data-strip]");
    const shown = document.querySelectorAll("#compare img")[1];
    if (!kept || !shown) return;
    const scale = Number(event.target.value);
    const [, address] = JSON.parse(kept.dataset.strip).reduce((a, b) => Math.abs(b[0] - scale) < Math.abs(a[0] - scale) ? b : a);
    shown.src = address;
  });
})();
