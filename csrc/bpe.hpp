// Exact SentencePiece BPE: texts to ids.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "block.hpp"
#include "bpe_tables.hpp"
#include "merging.hpp"
#include "normalizer.hpp"
#include "word_cache.hpp"

namespace cpt {

// The ids of a block's documents back to back, with their borders.
template <class Token>
struct Encoded {
  std::vector<Token> tokens;
  std::vector<std::int32_t> lengths;  // of each document, borders included; 0 where its text gives no token
  std::int64_t byte_tokens = 0;       // of the byte fallback
  std::int64_t unknown_tokens = 0;
};

// Ids put around each document that has tokens; below 0: none.
struct Borders {
  std::int64_t before = -1;
  std::int64_t after = -1;
};

// What one thread needs while it encodes: kept from block to block for its cache, never for its content.
struct BpeScratch {
  std::string text;
  std::vector<Symbol> symbols;
  LongMerger merger;
  WordCache cache;
};

// How it is fast and exact: two characters can only end up in one piece if some piece holds them side by side.
// So a text may be cut wherever no piece does, and each part is merged on its own: short parts by looking
// through them for the best pair again and again, long ones with a heap, frequent ones from a cache.
class BpeEncoder {
 public:
  BpeEncoder(const std::vector<Piece>& pieces, bool byte_fallback, const NormalizerSettings& settings);

  // May be called by several threads at once; the result depends on nothing but the block.
  template <class Token>
  Encoded<Token> encode(const Block& block, Borders borders) const;

  std::size_t vocab_size() const { return tables_.vocab_size(); }

 private:
  std::unique_ptr<BpeScratch> take_scratch() const;
  void give_back(std::unique_ptr<BpeScratch> scratch) const;

  BpeTables tables_;
  Normalizer normalizer_;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<BpeScratch>> idle_;
};

extern template Encoded<std::uint16_t> BpeEncoder::encode(const Block&, Borders) const;
extern template Encoded<std::int32_t> BpeEncoder::encode(const Block&, Borders) const;

}  // namespace cpt
