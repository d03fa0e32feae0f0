#include "merging.hpp"

#include <algorithm>
#include <functional>
#include <limits>
#include <stdexcept>

namespace cpt {

namespace {

constexpr std::size_t kKeptSymbols = std::size_t{1} << 20;

std::uint32_t rank_of(const BpeTables& tables, Symbol pair) {
  return pair == kNoSymbol ? kNoSymbol : tables.rank(pair);
}

}  // namespace

std::size_t merge_short(const BpeTables& tables, Symbol* symbols, Symbol* pairs, std::size_t count) {
  std::size_t best = 0;
  Symbol merged = count > 1 ? pairs[0] : kNoSymbol;
  for (std::size_t k = 1; k + 1 < count; ++k) {
    best = pairs[k] < merged ? k : best;
    merged = pairs[k] < merged ? pairs[k] : merged;
  }
  while (merged != kNoSymbol) {
    if (merged >= tables.first_tie()) {
      best = 0;
      while (rank_of(tables, pairs[best]) != tables.rank(merged)) ++best;
      merged = pairs[best];
    }
    symbols[best] = merged;
    --count;
    const std::size_t at = best;
    const Symbol on_left = at > 0 ? tables.merged(symbols[at - 1], merged) : kNoSymbol;
    const Symbol on_right = at + 1 < count ? tables.merged(merged, symbols[at + 2]) : kNoSymbol;
    // The best of the pairs that stay does not wait for the two loads above, and mostly it is the next one:
    // so the processor goes on with it, and the two branches below take it back where it was not.
    merged = kNoSymbol;
    for (std::size_t k = 0; k + 1 < at; ++k) {
      best = pairs[k] < merged ? k : best;
      merged = pairs[k] < merged ? pairs[k] : merged;
    }
    for (std::size_t k = at + 1; k < count; ++k) {
      symbols[k] = symbols[k + 1];
      if (k + 1 == count) break;
      pairs[k] = pairs[k + 1];
      best = pairs[k] < merged ? k : best;
      merged = pairs[k] < merged ? pairs[k] : merged;
    }
    if (at > 0) {
      pairs[at - 1] = on_left;
      if (__builtin_expect(on_left < merged, 0)) {
        merged = on_left;
        best = at - 1;
      }
    }
    if (at + 1 < count) {
      pairs[at] = on_right;
      if (__builtin_expect(on_right < merged, 0)) {
        merged = on_right;
        best = at;
      }
    }
  }
  return count;
}

void LongMerger::merge(const BpeTables& tables, std::vector<Symbol>& symbols) {
  start(tables, symbols);
  const std::size_t count = symbols.size();
  while (!heap_.empty()) {
    const std::uint64_t top = heap_.front();
    std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
    heap_.pop_back();
    const std::size_t left = top & 0xffffffffu;
    if (rank_of(tables, pairs_[left]) != top >> 32) continue;
    const std::size_t right = next_[left];
    symbols[left] = pairs_[left];
    pairs_[right] = kNoSymbol;
    next_[left] = next_[right];
    if (next_[left] < count) previous_[next_[left]] = static_cast<std::uint32_t>(left);
    pair_up(tables, symbols, left);
    if (left > 0) pair_up(tables, symbols, previous_[left]);
  }
  std::size_t kept = 0;
  for (std::size_t k = 0; k < count; k = next_[k]) symbols[kept++] = symbols[k];
  symbols.resize(kept);
  if (heap_.capacity() > kKeptSymbols) *this = LongMerger();
}

void LongMerger::start(const BpeTables& tables, const std::vector<Symbol>& symbols) {
  const std::size_t count = symbols.size();
  if (count >= std::numeric_limits<std::uint32_t>::max()) throw std::length_error("2^32 characters without a cut");
  pairs_.assign(count, kNoSymbol);
  next_.resize(count);
  previous_.resize(count);
  heap_.clear();
  for (std::size_t k = 0; k < count; ++k) {
    next_[k] = static_cast<std::uint32_t>(k + 1);
    previous_[k] = static_cast<std::uint32_t>(k) - 1;
    if (k + 1 == count) break;
    pairs_[k] = tables.merged(symbols[k], symbols[k + 1]);
    if (pairs_[k] != kNoSymbol) heap_.push_back((std::uint64_t{tables.rank(pairs_[k])} << 32) | k);
  }
  std::make_heap(heap_.begin(), heap_.end(), std::greater<>());
}

void LongMerger::pair_up(const BpeTables& tables, const std::vector<Symbol>& symbols, std::size_t left) {
  pairs_[left] = next_[left] < symbols.size() ? tables.merged(symbols[left], symbols[next_[left]]) : kNoSymbol;
  if (pairs_[left] == kNoSymbol) return;
  heap_.push_back((std::uint64_t{tables.rank(pairs_[left])} << 32) | left);
  std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
}

}  // namespace cpt
