// Completes what the theme adds after a page has loaded: tables that scroll sideways can be reached with the
// keyboard, and the copy buttons of code blocks are not landmarks.
const complete = () => {
  document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])").forEach((table) => {
    table.tabIndex = 0;
  });
  document.querySelectorAll("nav.md-code__nav:not([role])").forEach((buttons) => {
    buttons.setAttribute("role", "group");
  });
};
new MutationObserver(complete).observe(document.body, { childList: true, subtree: true });
complete();
