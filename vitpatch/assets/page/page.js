// Hands each chart's specification to vega-embed, in the colours of the page's scheme, and again when that changes.
(() => {
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const range = {
    light: ["#0072B2", "#CC79A7", "#000000", "#56B4E9", "#882255", "#999933", "#7F7F7F", "#332288"],
    dark: ["#56B4E9", "#CC79A7", "#F0E442", "#E6E9ED", "#E8718D", "#8FA83A", "#9AA0A6", "#8C8CFF"],
  };
  const config = (dark) => {
    const ink = dark ? "#e6e9ed" : "#1b1f24", line = dark ? "#343b44" : "#e1e5ea", domain = dark ? "#6a737d" : "#8b949e";
    const axis = { labelColor: ink, titleColor: ink, gridColor: line, domainColor: domain, tickColor: domain, titleFontWeight: "normal" };
    return {
      background: "transparent", font: "system-ui, sans-serif", view: { stroke: null }, text: { color: ink },
      axis, legend: { labelColor: ink, titleColor: ink, titleFontWeight: "normal" }, range: { category: dark ? range.dark : range.light },
    };
  };
  const specs = [...document.querySelectorAll(".chart")].map((box) => [box, JSON.parse(box.querySelector("script").textContent)]);
  let turn = 0;
  const draw = async () => {
    const now = ++turn, dark = scheme.matches;
    const how = { actions: false, ast: true, renderer: "svg", config: config(dark), tooltip: { theme: dark ? "dark" : "light" } };
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
