// What the theme leaves out: names for the landmarks of code blocks, and the keyboard for what
// scrolls sideways.
function complete() {
  document.querySelectorAll(".md-code__nav:not([aria-label])").forEach((nav) => {
    nav.setAttribute("aria-label", `Of ${nav.parentElement.id}`);
  });
  document.querySelectorAll("pre > code, .md-typeset__scrollwrap, .md-typeset__table > table").forEach((box) => {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  });
}
new MutationObserver(complete).observe(document.body, { childList: true, subtree: true });
addEventListener("resize", complete);
complete();
