"use strict";
// A link to a candidate opens it, whatever hides it: a filter, or the fold of its run.
(() => {
  const open = () => {
    const name = location.hash.slice(1), item = name && document.getElementById(name);
    if (!item || !name.startsWith("cand-")) return;
    item.closest("section").querySelector(".show [value=all]").checked = true;
    for (let part = item.querySelector("details"); part; part = part.parentElement) {
      if (part.tagName === "DETAILS") part.open = true;
    }
    item.scrollIntoView();
    item.querySelector("summary").focus({ preventScroll: true });
  };
  addEventListener("hashchange", open);
  // The same link once more changes no address.
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (link && link.getAttribute("href") === location.hash) open();
  });
  open();
})();
