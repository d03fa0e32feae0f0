#include "merge_table.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace cpt {

namespace {

constexpr std::size_t kPairsPerGroup = 4;
constexpr int kMaxTries = 64;  // the first one nearly always does

}  // namespace

MergeTable::MergeTable(const std::vector<Merge>& merges) : size_(merges.size() + merges.size() / 4 + 1) {
  unsigned bits = 1;
  while ((std::size_t{1} << bits) * kPairsPerGroup < merges.size()) ++bits;
  group_shift_ = 64 - bits;
  for (int tries = 1; !fill(merges); ++tries) {
    if (tries == kMaxTries) throw std::invalid_argument("no table holds its merges: is a pair there twice?");
    multiplier_ = multiplier_ * 0xd1342543de82ef95u | 1;
  }
}

// Whether every group found its number.
bool MergeTable::fill(const std::vector<Merge>& merges) {
  const std::size_t groups = std::size_t{1} << (64 - group_shift_);
  entries_.assign(size_, kEmpty);
  displacements_.assign(groups, 0);
  const auto hash_of = [&](std::size_t k) { return pack(merges[k].left, merges[k].right) * multiplier_; };
  std::vector<std::uint32_t> starts(groups + 1, 0);  // of each group in `members`
  for (std::size_t k = 0; k < merges.size(); ++k) ++starts[(hash_of(k) >> group_shift_) + 1];
  std::partial_sum(starts.begin(), starts.end(), starts.begin());
  std::vector<std::uint32_t> members(merges.size());
  std::vector<std::uint32_t> ends(starts.begin(), starts.end() - 1);
  for (std::size_t k = 0; k < merges.size(); ++k) {
    members[ends[hash_of(k) >> group_shift_]++] = static_cast<std::uint32_t>(k);
  }
  const auto size_of = [&](std::size_t group) { return starts[group + 1] - starts[group]; };
  std::vector<std::uint32_t> order(groups);  // the largest groups first
  std::iota(order.begin(), order.end(), 0u);
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return size_of(a) > size_of(b); });
  std::vector<std::size_t> places;
  for (const std::size_t group : order) {
    if (size_of(group) == 0) break;
    std::uint32_t displacement = 0;
    for (;; ++displacement) {
      if (displacement > std::numeric_limits<std::uint16_t>::max()) return false;
      places.clear();
      for (std::uint32_t m = starts[group]; m < starts[group + 1]; ++m) {
        const std::size_t at = place(hash_of(members[m]), displacement);
        if (entries_[at] != kEmpty || std::find(places.begin(), places.end(), at) != places.end()) break;
        places.push_back(at);
      }
      if (places.size() == size_of(group)) break;
    }
    displacements_[group] = static_cast<std::uint16_t>(displacement);
    for (std::size_t m = 0; m < places.size(); ++m) {
      const Merge& merge = merges[members[starts[group] + m]];
      entries_[places[m]] = (pack(merge.left, merge.right) << kSymbolBits) | merge.merged;
    }
  }
  return true;
}

}  // namespace cpt
