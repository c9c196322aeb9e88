// Runs every kernel of every variant over many shapes, against sums in double, from one thread and
// from several; and everything that the interface refuses. For sanitizers and emulators above all,
// which Python's tests do not run under: `make sanitize`, `make neon`.
//
//   kernels_test [variant ...]     fails if the library does not have exactly these variants
#include <chrono>
#include <sstream>
#include <string>

#include "support.h"

int main(int argc, char** argv) {
  std::string wanted;
  for (int i = 1; i < argc; ++i) wanted += (i == 1 ? "" : " ") + std::string(argv[i]);
  if (argc > 1 && wanted != lk_isas()) {
    std::fprintf(stderr, "variants are '%s', not '%s'\n", lk_isas(), wanted.c_str());
    return 1;
  }
  Tally refusals;
  check_refusals(refusals);
  std::printf("interface: %d of %d expectations failed\n", int(refusals.wrong),
              int(refusals.checked));

  int64_t wrong = refusals.wrong;
  std::istringstream isas(lk_isas());
  for (std::string isa; isas >> isa;) {
    if (lk_set_isa(isa.c_str()) != LK_OK || isa != lk_isa()) return 1;
    const auto start = std::chrono::steady_clock::now();
    Tally tally;
    check_nf4_linear(tally, 80);
    check_nf4_linear_int8(tally, 60);
    check_nf4_swiglu(tally, 50);
    check_linear_cross_entropy(tally, 50);
    check_low_rank(tally, 40);
    check_ranged_attention(tally, 30);
    check_callers(tally);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%s: %d of %d expectations failed, %.1f s\n", isa.c_str(), int(tally.wrong),
                int(tally.checked), seconds.count());
    std::fflush(stdout);
    wrong += tally.wrong;
  }
  return wrong == 0 ? 0 : 1;
}
