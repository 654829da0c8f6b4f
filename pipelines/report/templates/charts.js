(() => {
  // Charts: the values at the step under the pointer, or where the arrow keys lead.
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const written = (value) => value === null ? "not a number" : Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));
  for (const svg of document.querySelectorAll("[data-chart]")) {
    const { x: [left, right, first, last], series } = charts[svg.dataset.chart];
    const cursor = svg.querySelector(".cursor"), values = svg.parentElement.querySelector(".values");
    const steps = [...new Set(series.flatMap((one) => one.steps))].sort((a, b) => a - b);
    let at = steps.length - 1;
    const nearest = (list, step) => list.reduce((best, other, i) => Math.abs(other - step) < Math.abs(list[best] - step) ? i : best, 0);
    const show = () => {
      const step = steps[at], place = left + (step - first) / (last - first) * (right - left);
      cursor.setAttribute("x1", place);
      cursor.setAttribute("x2", place);
      cursor.setAttribute("visibility", "visible");
      const lines = series.filter((one) => one.steps.length).map((one) => {
        const i = nearest(one.steps, step);
        return `${one.name} ${written(one.values[i])}${one.steps[i] === step ? "" : ` (at ${written(one.steps[i])})`}`;
      });
      values.textContent = [`step ${written(step)}`, ...lines].join("\n");
      const before = place > (left + right) / 2;
      values.style.right = before ? "auto" : "0";
      values.style.left = before ? "0" : "auto";
      values.hidden = false;
    };
    const hide = () => { cursor.setAttribute("visibility", "hidden"); values.hidden = true; };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), place = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      at = nearest(steps, first + (place - left) / (right - left) * (last - first));
      show();
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) show(); });
    svg.addEventListener("keydown", (event) => {
      const stride = Math.max(1, Math.round(steps.length / 50));
      const to = { ArrowRight: at + stride, ArrowLeft: at - stride, Home: 0, End: steps.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      at = Math.min(steps.length - 1, Math.max(0, to));
      show();
    });
  }
})();
