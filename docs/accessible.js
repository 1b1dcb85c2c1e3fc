// Completes what the theme adds after a page has loaded: tables that scroll sideways can be reached with the
// keyboard, and the buttons of each code block have a name of their own.
const complete = () => {
  document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])").forEach((table) => {
    table.tabIndex = 0;
  });
  document.querySelectorAll("nav.md-code__nav").forEach((buttons, number) => {
    buttons.ariaLabel ??= `Code block ${number + 1}`;
  });
};
new MutationObserver(complete).observe(document.body, { childList: true, subtree: true });
complete();
