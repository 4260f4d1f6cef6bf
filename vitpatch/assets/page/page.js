// Hands each chart's specification to vega-embed, in the theme of the page's scheme, and again when that changes.
(() => {
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const specs = [...document.querySelectorAll(".chart")].map((box) => [box, JSON.parse(box.querySelector("script").textContent)]);
  let turn = 0;
  const draw = async () => {
    const now = ++turn, dark = scheme.matches;
    const how = { actions: false, ast: true, renderer: "svg", config: dark ? themes.dark : themes.light, tooltip: { theme: dark ? "dark" : "light" } };
    for (const [box, spec] of specs) {
      if (now !== turn) return;
      await vegaEmbed(box, spec, how);
      await new Promise((done) => setTimeout(done));
    }
    document.documentElement.dataset.drawn = dark ? "dark" : "light";
  };
  scheme.addEventListener("change", draw);
  draw();
})();
