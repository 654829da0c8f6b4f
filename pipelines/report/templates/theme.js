"use strict";
(() => {
  const root = document.documentElement, button = document.querySelector(".theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const shown = () => root.dataset.theme || (dark.matches ? "dark" : "light");
  const tell = () => {
    button.querySelector("span").textContent = shown();
    button.setAttribute("aria-pressed", String(shown() === "dark"));
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = shown() === "dark" ? "light" : "dark";
    tell();
  });
  dark.addEventListener("change", tell);
  tell();
})();
