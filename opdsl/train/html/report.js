// The page works without this: it only adds numbers under the pointer and a choice of theme.
"use strict";
(function () {
  var root = document.documentElement;

  // ---- light, dark, or as the system says
  var button = document.getElementById("theme");
  var themes = ["system", "light", "dark"];
  var theme = 0;
  function show() {
    if (themes[theme] === "system") { root.removeAttribute("data-theme"); }
    else { root.setAttribute("data-theme", themes[theme]); }
    button.textContent = "Theme: " + themes[theme];
  }
  if (button) {
    button.hidden = false;
    button.addEventListener("click", function () { theme = (theme + 1) % themes.length; show(); });
    show();
  }

  // ---- values of a curve under the pointer
  function written(value, unit) {
    if (unit === "share") { return (value * 100).toPrecision(3) + " %"; }
    return String(Number(value.toPrecision(4))).replace("-", "\u2212");
  }
  function nearest(points, x) {
    var low = 0, high = points.length - 1;
    while (high - low > 1) {
      var middle = (low + high) >> 1;
      if (points[middle][0] < x) { low = middle; } else { high = middle; }
    }
    return x - points[low][0] < points[high][0] - x ? points[low] : points[high];
  }
  Array.prototype.forEach.call(document.querySelectorAll("figure"), function (figure) {
    var holder = figure.querySelector("script[type='application/json']");
    var svg = figure.querySelector("svg.chart");
    var readout = figure.querySelector(".readout");
    var cross = figure.querySelector(".cross");
    if (!holder || !svg || !readout || !cross) { return; }
    var data = JSON.parse(holder.textContent);
    var axis = data.x; // lowest and highest step, first and last pixel
    svg.addEventListener("pointermove", function (event) {
      var box = svg.getBoundingClientRect();
      var pixel = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
      var step = axis[0] + (pixel - axis[2]) / (axis[3] - axis[2]) * (axis[1] - axis[0]);
      var found = data.series.map(function (s) { return [s.label, nearest(s.points, step)]; });
      var at = found[0][1][0];
      var place = axis[2] + (at - axis[0]) / (axis[1] - axis[0]) * (axis[3] - axis[2]);
      cross.setAttribute("x1", place);
      cross.setAttribute("x2", place);
      cross.style.visibility = "visible";
      readout.textContent = "step " + at + "   " + found.map(function (f) {
        return f[0] + " " + written(f[1][1], data.unit);
      }).join("   ");
    });
    svg.addEventListener("pointerleave", function () {
      cross.style.visibility = "hidden";
      readout.textContent = "";
    });
  });

  // ---- numbers of a token, by pointer and by keyboard
  var tip = document.getElementById("tip");
  function tell(token) {
    tip.textContent = token.dataset.tip; // text, never markup
    var box = token.getBoundingClientRect();
    tip.style.left = Math.max(8, Math.min(box.left, window.innerWidth - tip.offsetWidth - 8)) + "px";
    var above = box.top - tip.offsetHeight - 8;
    tip.style.top = (above > 8 ? above : box.bottom + 8) + "px";
    tip.style.visibility = "visible";
  }
  function hide() { tip.style.visibility = "hidden"; }
  Array.prototype.forEach.call(document.querySelectorAll(".tokens"), function (group) {
    var tokens = Array.prototype.slice.call(group.querySelectorAll(".tok"));
    tokens.forEach(function (token, i) {
      token.dataset.tip = token.title;
      token.setAttribute("aria-label", token.title);
      token.removeAttribute("title");
      token.addEventListener("pointerenter", function () { tell(token); });
      token.addEventListener("pointerleave", hide);
      token.addEventListener("focus", function () { tell(token); });
      token.addEventListener("blur", hide);
      token.addEventListener("keydown", function (event) {
        var next = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tokens.length - 1 }[event.key];
        if (event.key === "Escape") { hide(); }
        if (next === undefined || !tokens[next]) { return; }
        event.preventDefault();
        token.tabIndex = -1;
        tokens[next].tabIndex = 0;
        tokens[next].focus();
      });
    });
  });
})();
