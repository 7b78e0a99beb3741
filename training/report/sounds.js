
// One player for all sounds of the page; they are read from their JSON when the first is asked for.
let sounds = null, playing = null;
const player = new Audio();
function stop() {
  player.pause();
  if (playing) { playing.setAttribute("aria-pressed", "false"); playing.style.removeProperty("--at"); }
  playing = null;
}
function play(button) {
  sounds = sounds || JSON.parse(document.getElementById("sounds").textContent);
  stop();
  playing = button;
  button.setAttribute("aria-pressed", "true");
  player.src = sounds[button.dataset.sound];
  player.play().catch((error) => { if (playing === button) { button.title = `This browser cannot play it: ${error.message}`; stop(); } });
}
player.ontimeupdate = () => { if (playing) playing.style.setProperty("--at", player.currentTime / +playing.dataset.seconds); };
player.onended = stop;
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-sound]");
  if (button) { if (button === playing) stop(); else play(button); }
});
drawAll();
root.dataset.drawn = "true";
